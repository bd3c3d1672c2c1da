"""The reference's JSON bodies as messages, with errors that name the field.

protobuf's own JSON errors lose list indices, and some wrong values pass it silently (`true` for an enum, a
key given twice under both of its names), so the body is walked against the message's descriptor first.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from google.protobuf import duration_pb2, json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from chromarpc.v1 import generation_service_pb2

MAX_UNKNOWN = 100
"""How many unknown keys are named; a body may hold millions."""
MAX_VIOLATIONS = 100
"""How many wrong values are named; a body may hold millions."""
_MAX_KEY = 100
_INTEGER_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_NUMBER_TEXT = re.compile(r"-?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,5})?")
_DURATION = duration_pb2.Duration.DESCRIPTOR.full_name
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class InvalidRequestJson(ValueError):
    """A body that is no request.

    Attributes:
        violations: every value at fault, at most 100: its dotted path, such as `prompts.1.width`, which is empty
            for the body itself, and what is wrong with it.
        path: path of the first.
        message: what is wrong with the first.
        request: what could be read beside them; None where the body is no object.
    """

    def __init__(
        self,
        path: str,
        message: str,
        *,
        further: Sequence[tuple[str, str]] = (),
        request: generation_service_pb2.GenerateRequest | None = None,
    ) -> None:
        self.violations = ((path, message), *further)
        lines = [f"{at}: {what}" if at else what for at, what in self.violations]
        super().__init__("\n  ".join(["the body is no request:", *lines] if further else lines))
        self.path = path
        self.message = message
        self.request = request


@dataclass(frozen=True)
class ParsedRequest:
    """A body, understood."""

    request: generation_service_pb2.GenerateRequest
    unknown: tuple[str, ...]
    """Dotted paths of keys that the schema does not have, the first 100; they were left out."""


def parse_request_json(text: str | bytes) -> ParsedRequest:
    """Parses a JSON body; whether its values are served is the server's to say.

    Keys may be written as in the schema (`sample_steps`) or in protobuf's lower camel case (`sampleSteps`);
    null means left out. As in protobuf's mapping a number may also be written as text, and a whole one as `4.0`.

    Raises:
        InvalidRequestJson: not JSON, not an object, or values of the wrong type or out of their type's range: all
            of them.
    """
    try:
        body = json.loads(text, object_pairs_hook=_Object)
    except UnicodeDecodeError:
        raise InvalidRequestJson("", "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestJson("", f"the body is not JSON: {error}") from None
    except ValueError:  # the interpreter's bound on the digits of an integer
        raise InvalidRequestJson("", "the body holds a number of thousands of digits") from None
    except RecursionError:
        raise InvalidRequestJson("", "the body is nested too deeply") from None
    if not isinstance(body, _Object):
        raise InvalidRequestJson("", f"must be an object, got {_kind(body)}")
    found = _Findings()
    cleaned = _message(body, generation_service_pb2.GenerateRequest.DESCRIPTOR, "", found)
    request = generation_service_pb2.GenerateRequest()
    try:
        json_format.ParseDict(cleaned, request)
    except json_format.ParseError as error:
        raise InvalidRequestJson("", f"the body is no request: {error}") from None
    if found.violations:
        (path, message), *further = found.violations
        raise InvalidRequestJson(path, message, further=further, request=request)
    return ParsedRequest(request, tuple(found.unknown))


@dataclass
class _Findings:
    """What was found so far while walking one body."""

    unknown: list[str] = field(default_factory=list)
    violations: list[tuple[str, str]] = field(default_factory=list)

    def add_unknown(self, at: str) -> None:
        if len(self.unknown) < MAX_UNKNOWN:
            self.unknown.append(at)

    def refuse(self, at: str, message: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append((at, message))


class _Wrong(Exception):
    """A value that its field cannot hold; the text says why."""


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: frozenset[str] = frozenset()
        if len(self) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated = frozenset(key for key, count in counts.items() if count > 1)


def _message(value: _Object, descriptor: Descriptor, path: str, found: _Findings) -> dict[str, Any]:
    """The object's fields under their own names, without those that are wrong or unknown."""
    fields = {entry.json_name: entry for entry in descriptor.fields}
    fields |= {entry.name: entry for entry in descriptor.fields}
    cleaned: dict[str, Any] = {}
    for key, item in value.items():
        at = f"{path}.{key[:_MAX_KEY]}" if path else key[:_MAX_KEY]
        entry = fields.get(key)
        if entry is None:
            found.add_unknown(at)
        elif key in value.repeated or entry.name in cleaned:
            found.refuse(at, "is given twice")
        elif item is not None:
            try:
                cleaned[entry.name] = _field(item, entry, at, found)
            except _Wrong as error:
                found.refuse(at, str(error))
    return {name: item for name, item in cleaned.items() if item is not None}


def _field(value: object, entry: FieldDescriptor, at: str, found: _Findings) -> object:
    if not entry.is_repeated:
        return _item(value, entry, at, found)
    if not isinstance(value, list):
        raise _Wrong(f"must be a list, got {_kind(value)}")
    items: list[object] = []
    for index, item in enumerate(value):
        try:
            items.append(_item(item, entry, f"{at}.{index}", found))
        except _Wrong as error:
            found.refuse(f"{at}.{index}", str(error))
            if entry.message_type is not None:
                items.append({})  # its place is kept, so that what is said of the others names their own
    return items


def _item(value: object, entry: FieldDescriptor, at: str, found: _Findings) -> object:
    """A value as `json_format` takes it; None where it means that the field is left out."""
    if entry.message_type is not None:
        if entry.message_type.full_name == _DURATION:
            return _duration(value)
        if not isinstance(value, _Object):
            raise _Wrong(f"must be an object, got {_kind(value)}")
        return _message(value, entry.message_type, at, found)
    if entry.enum_type is not None:
        return _enum(value, entry.enum_type)
    kind = entry.cpp_type
    if kind in _INTEGER_RANGES:
        return _integer(value, kind)
    if kind in _FLOATS:
        return _number(value)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise _Wrong(f"must be true or false, got {_kind(value)}")
        return value
    if not isinstance(value, str):
        raise _Wrong(f"must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Wrong("holds a lone surrogate, which is no character") from None
    return value


def _enum(value: object, enum: EnumDescriptor) -> str | None:
    if value == "":
        return None
    for entry in enum.values:
        if value == entry.name or (value == entry.number and not isinstance(value, bool)):
            return entry.name
    raise _Wrong(f"must be one of {', '.join(entry.name for entry in enum.values)}")


def _duration(value: object) -> object:
    try:
        duration_pb2.Duration().FromJsonString(value if isinstance(value, str) else "")
    except ValueError:
        raise _Wrong(f'must be seconds as text, such as "30s", got {_kind(value)}') from None
    return value


def _integer(value: object, kind: int) -> int:
    low, high = _INTEGER_RANGES[kind]
    number = _read(value)
    if number is None or not number.is_finite() or number != number.to_integral_value():
        raise _Wrong(f"must be a whole number, got {_kind(value)}")
    if not low <= number <= high:
        raise _Wrong(f"must be between {low} and {high}")
    return int(number)


def _number(value: object) -> float:
    number = _read(value)
    if number is None:
        raise _Wrong(f"must be a number, got {_kind(value)}")
    try:
        nearest = float(number)
    except OverflowError:
        nearest = math.inf
    if not math.isfinite(nearest):
        raise _Wrong("must be a finite number")
    return nearest


def _read(value: object) -> Decimal | None:
    """A number, or the text of one, exactly; None where it is neither."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER_TEXT.fullmatch(value):
        return None
    return Decimal(value)


def _kind(value: object) -> str:
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, float):
        return f"{value:g}"
    return _KINDS.get(type(value), "a number")
