"""Values of ours as bytes, and back: JSON with the bytes beside it. Makes nothing but the values listed here.

Both ends have the same version, which is checked before, so fields go by their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain import (
    devices,
    errors,
    events,
    fallbacks,
    limits,
    models,
    plan,
    requests,
    sampling_choices,
    trainer,
)
from chromarpc_server.runtime import model_cache, work

_MODULES = (
    devices,
    events,
    fallbacks,
    limits,
    models,
    plan,
    requests,
    sampling_choices,
    trainer,
    model_cache,
    work,
)

FileOf = Callable[[str, int], AdapterFile]
"""What this end knows a file by: its SHA-256 and its size."""


class NotOurs(ValueError):
    """Bytes that no end of ours has sent."""


def _classes(module: ModuleType, kind: Callable[[type], bool]) -> Iterator[type]:
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and kind(value):
            yield value


_VALUES: dict[str, type] = {
    found.__name__: found for module in _MODULES for found in _classes(module, is_dataclass)
}
_ENUMS: dict[str, type[Enum]] = {
    found.__name__: found
    for module in _MODULES
    for found in _classes(module, lambda one: issubclass(one, Enum))
    if issubclass(found, Enum)
}
_ERRORS: dict[str, type[errors.ChromaError]] = {
    found.__name__: found
    for found in _classes(errors, lambda one: issubclass(one, errors.ChromaError))
    if issubclass(found, errors.ChromaError)
}
_NAMES: dict[type, tuple[str, ...]] = {}
"""Their fields, in order."""
_VALUES["QuotaViolation"] = errors.QuotaViolation
_VALUES["FieldViolation"] = errors.FieldViolation


def register(*kinds: type) -> None:
    """Lets frozen dataclasses of this package cross too."""
    _VALUES.update({kind.__name__: kind for kind in kinds})
    _NAMES.update({kind: tuple(field.name for field in fields(kind)) for kind in kinds})


register(*_VALUES.values())


def encode(value: object) -> tuple[bytes, list[bytes]]:
    """A value as JSON, and the bytes that it names by their number.

    Raises:
        TypeError: it holds what does not cross.
    """
    blobs: list[bytes] = []
    return json.dumps(_plain(value, blobs), separators=(",", ":")).encode(), blobs


def decode(text: bytes, blobs: Sequence[bytes], file_of: FileOf | None = None) -> Any:
    """The value; sequences are tuples.

    Raises:
        NotOurs: it is none.
    """
    try:
        return _value(json.loads(text), blobs, file_of)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise NotOurs(f"not a value of ours: {type(error).__name__}") from None


def _plain(value: Any, blobs: list[bytes]) -> Any:
    match value:
        case Enum():
            return {"enum": type(value).__name__, "is": value.value}
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            blobs.append(value)
            return {"blob": len(blobs) - 1}
        case tuple() | list():
            return [_plain(item, blobs) for item in value]
        case Mapping():
            return {"map": [[key, _plain(item, blobs)] for key, item in value.items()]}
        case Path():
            return {"path": str(value)}
        case AdapterFile():
            return {"file": value.sha256, "size": value.size_bytes}
        case errors.ChromaError():
            parts = (value.message, value.violations, value.metadata, value.retry_after_s, value.quota)
            return {"error": type(value).__name__, "of": [_plain(part, blobs) for part in parts]}
    name = type(value).__name__
    kind = _VALUES.get(name)
    if kind is None or not isinstance(value, kind):
        raise TypeError(f"{name} does not cross")
    return {"value": name, "of": [_plain(getattr(value, name), blobs) for name in _NAMES[kind]]}


def _value(plain: Any, blobs: Sequence[bytes], file_of: FileOf | None) -> Any:
    if isinstance(plain, list):
        return tuple(_value(item, blobs, file_of) for item in plain)
    if not isinstance(plain, dict):
        return plain
    if "value" in plain:
        return _VALUES[plain["value"]](*(_value(item, blobs, file_of) for item in plain["of"]))
    if "enum" in plain:
        return _ENUMS[plain["enum"]](plain["is"])
    if "map" in plain:
        return {key: _value(item, blobs, file_of) for key, item in plain["map"]}
    if "blob" in plain:
        return blobs[plain["blob"]]
    if "path" in plain:
        return Path(plain["path"])
    if "file" in plain and file_of is not None:
        return file_of(plain["file"], plain["size"])
    message, violations, metadata, retry_after_s, quota = (_value(item, blobs, file_of) for item in plain["of"])
    return _ERRORS[plain["error"]](
        message, violations=violations, metadata=metadata, retry_after_s=retry_after_s, quota=quota
    )
