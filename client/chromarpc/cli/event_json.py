"""Events and messages as JSON for scripts: no picture bytes, but the paths of files that were written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.errors import ChromarpcError, StatusError
from chromarpc.events import Event
from chromarpc.images import GeneratedImage


def event_line(event: Event, path: Path | None) -> str:
    """One line: `event` (`image_ready`, …), the event's own fields, and `path` where a file was written."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    values = {"event": name, **_fields(event)}
    if path is not None:
        values["path"] = str(path)
    return json.dumps(values)


def error_line(error: ChromarpcError) -> str:
    """The last line of a generation that failed: `event` is `error`."""
    values: dict[str, Any] = {"event": "error", "error": type(error).__name__, "message": error.message}
    if isinstance(error, StatusError):
        values |= {
            "code": error.code.name,
            "reason": error.reason,
            "violations": [dataclasses.asdict(violation) for violation in error.violations],
            "metadata": error.metadata,
            "retry_after_s": error.retry_after_s,
        }
    return json.dumps(values)


def message_json(message: Message) -> dict[str, Any]:
    """A message under its schema's names, every field present, 64-bit numbers as numbers, enums by name.

    A message that was left out is None; a time is RFC 3339 text in UTC.
    """
    return {field.name: _field_json(message, field) for field in message.DESCRIPTOR.fields}


def _field_json(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.has_presence and not message.HasField(field.name):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if field.is_repeated:
        return [_value_json(item, field) for item in value]
    return _value_json(value, field)


def _value_json(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return message_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name if value in field.enum_type.values_by_number else value
    return value


def _fields(value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _plain(item) for name, item in fields.items() if not isinstance(item, bytes)}


def _plain(value: Any) -> Any:
    if isinstance(value, GeneratedImage):
        return {
            "media_type": value.media_type,
            "width": value.width,
            "height": value.height,
            "size_bytes": len(value.data),
            "sha256": value.sha256,
            "seed": value.seed,
        }
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
