"""Log lines: an event name and fields, as text for people or JSON for machines.

Callers pass the event as the message and its fields as `extra`. Neither prompts nor tokens are ever passed.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.devices import current_device_id

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What was logged beside the event, and who makes the call that it was logged in."""
    fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    fields.setdefault("caller", current_caller().name)
    fields.setdefault("device", current_device_id())
    return {key: value for key, value in fields.items() if key not in ("caller", "device") or value}


def _one_line(value: object) -> str:
    """A value that cannot pretend to be another line or field."""
    text = str(value)
    return text if text.isprintable() and '"' not in text and " " not in text else json.dumps(text)


class TextFormatter(logging.Formatter):
    """`12:00:00 INFO job.accepted job_id=… images=1`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it where there is one."""
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        fields = "".join(f" {key}={_one_line(value)}" for key, value in _fields(record).items())
        line = f"{time} {record.levelname} {record.getMessage()}{fields}"
        text = f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
        # Indented, so that what an exception quotes cannot pretend to be another event.
        return "\n    ".join(text.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's fields, its time in UTC, its level and its event."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str, *, as_json: bool) -> None:
    """Sends this package's records to standard error, and other libraries' warnings with them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in ("chromarpc_server", "chromarpc.audit"):
        logging.getLogger(ours).setLevel(level.upper())
