"""An actor's log goes to its server: what a process of Ray's writes, Ray keeps in files of its own."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable

from chromarpc_server.cluster.messages import Logged

MAX_TEXT = 16 * 1024
_STANDARD = frozenset(vars(logging.makeLogRecord({})))


class LogSender(logging.Handler):
    """Takes lines on any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[Logged], None]) -> None:
        """`send` is called on the loop."""
        super().__init__()
        self._loop = loop
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a line over; one that cannot be is dropped."""
        try:
            self._loop.call_soon_threadsafe(self._send, _as_message(record))
        except RuntimeError:  # the loop has ended
            return
        except Exception:  # noqa: BLE001 - as handlers of the standard library do
            self.handleError(record)


def _as_message(record: logging.LogRecord) -> Logged:
    fields = tuple(
        (name, value if isinstance(value, int | float | bool | None) else str(value)[:MAX_TEXT])
        for name, value in vars(record).items()
        if name not in _STANDARD and name not in ("message", "asctime")
    )
    told = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    return Logged(record.name, record.levelno, record.getMessage()[:MAX_TEXT], fields, told[-MAX_TEXT:])


def write_here(line: Logged, *, device: str, host: str) -> None:
    """Writes a line that an actor sent to this process's log, with who says it."""
    logger = logging.getLogger(line.logger)
    if not logger.isEnabledFor(line.level):
        return
    record = logging.makeLogRecord(
        {
            "name": line.logger,
            "levelno": line.level,
            "levelname": logging.getLevelName(line.level),
            "msg": line.event,
            **{name: value for name, value in line.fields if name not in _STANDARD},
            **({"traceback": line.traceback} if line.traceback else {}),
            "device": device,
            "host": host,
        }
    )
    logger.handle(record)
