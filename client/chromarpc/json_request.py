"""The reference's JSON bodies as messages, with errors that name the field.

protobuf's own JSON errors lose list indices, and some wrong values pass it silently (`true` for an enum, a
key given twice under both of its names), so the body is walked against the message's descriptor first.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from chromarpc.v1 import generation_service_pb2

MAX_UNKNOWN = 100
"""How many unknown keys are named; a body may hold millions."""
_MAX_KEY = 100
_INTEGER_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_INTEGER_TEXT = re.compile(r"-?[0-9]{1,20}")
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class InvalidRequestJson(ValueError):
    """A body that is no request.

    Attributes:
        path: dotted path of the field at fault, such as `prompts.1.width`; empty for the body itself.
        message: what is wrong with it.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.message = message


@dataclass(frozen=True)
class ParsedRequest:
    """A body, understood."""

    request: generation_service_pb2.GenerateRequest
    unknown: tuple[str, ...]
    """Dotted paths of keys that the schema does not have, the first 100; they were left out."""


def parse_request_json(text: str | bytes) -> ParsedRequest:
    """Parses a JSON body; whether its values are served is the server's to say.

    Keys may be written as in the schema (`sample_steps`) or in protobuf's lower camel case (`sampleSteps`);
    null means left out. As in protobuf's mapping a whole number may also be written as text or as `4.0`.

    Raises:
        InvalidRequestJson: not JSON, not an object, or a value of the wrong type or out of its type's range.
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
    unknown: list[str] = []
    cleaned = _message(body, generation_service_pb2.GenerateRequest.DESCRIPTOR, "", unknown)
    request = generation_service_pb2.GenerateRequest()
    try:
        json_format.ParseDict(cleaned, request)
    except json_format.ParseError as error:
        raise InvalidRequestJson("", f"the body is no request: {error}") from None
    return ParsedRequest(request, tuple(unknown))


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: frozenset[str] = frozenset()
        if len(self) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated = frozenset(key for key, count in counts.items() if count > 1)


def _message(value: object, descriptor: Descriptor, path: str, unknown: list[str]) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise InvalidRequestJson(path, f"must be an object, got {_kind(value)}")
    fields = {field.json_name: field for field in descriptor.fields}
    fields |= {field.name: field for field in descriptor.fields}
    cleaned: dict[str, Any] = {}
    for key, item in value.items():
        at = f"{path}.{key[:_MAX_KEY]}" if path else key[:_MAX_KEY]
        field = fields.get(key)
        if field is None:
            if len(unknown) < MAX_UNKNOWN:
                unknown.append(at)
            continue
        if key in value.repeated or field.name in cleaned:
            raise InvalidRequestJson(at, "is given twice")
        if item is not None:
            cleaned[field.name] = _field(item, field, at, unknown)
    return cleaned


def _field(value: object, field: FieldDescriptor, at: str, unknown: list[str]) -> object:
    if not field.is_repeated:
        return _item(value, field, at, unknown)
    if not isinstance(value, list):
        raise InvalidRequestJson(at, f"must be a list, got {_kind(value)}")
    return [_item(item, field, f"{at}.{index}", unknown) for index, item in enumerate(value)]


def _item(value: object, field: FieldDescriptor, at: str, unknown: list[str]) -> object:
    kind = field.cpp_type
    if field.message_type is not None:
        return _message(value, field.message_type, at, unknown)
    if field.enum_type is not None:
        return _enum(value, field.enum_type, at)
    if kind in _INTEGER_RANGES:
        return _integer(value, kind, at)
    if kind in _FLOATS:
        return _number(value, at)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestJson(at, f"must be true or false, got {_kind(value)}")
        return value
    if not isinstance(value, str):
        raise InvalidRequestJson(at, f"must be text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestJson(at, "holds a lone surrogate, which is no character") from None
    return value


def _enum(value: object, enum: EnumDescriptor, at: str) -> str:
    for entry in enum.values:
        if value == entry.name or (value == entry.number and not isinstance(value, bool)):
            return entry.name
    raise InvalidRequestJson(at, f"must be one of {', '.join(entry.name for entry in enum.values)}")


def _integer(value: object, kind: int, at: str) -> int:
    low, high = _INTEGER_RANGES[kind]
    match value:
        case str() if _INTEGER_TEXT.fullmatch(value):
            value = int(value)
        case float() if value.is_integer():
            value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestJson(at, f"must be a whole number, got {_kind(value)}")
    if not low <= value <= high:
        raise InvalidRequestJson(at, f"must be between {low} and {high}")
    return value


def _number(value: object, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestJson(at, f"must be a number, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequestJson(at, "must be a finite number")
    return number


def _kind(value: object) -> str:
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, float):
        return f"{value:g}"
    return _KINDS.get(type(value), "a number")
