"""The reference's JSON bodies as messages, with errors that name the field.

protobuf's own JSON errors lose list indices, so the body is walked against the message's descriptor first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from chromarpc.v1 import generation_service_pb2

MAX_DEPTH = 16
MAX_UNKNOWN = 100
_INTEGER_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class InvalidRequestJson(ValueError):  # noqa: N818 - named for what it is about
    """A body that is no request.

    Attributes:
        path: dotted path of the field at fault, such as `prompts.1.width`; empty for the body itself.
        description: what is wrong with it.
    """

    def __init__(self, path: str, description: str) -> None:
        super().__init__(f"{path}: {description}" if path else description)
        self.path = path
        self.description = description


@dataclass(frozen=True)
class ParsedRequest:
    """A body, understood."""

    request: generation_service_pb2.GenerateRequest
    unknown: tuple[str, ...]
    """Dotted paths of keys that the schema does not have; they were left out."""


def parse_request_json(text: str | bytes) -> ParsedRequest:
    """Parses a JSON body.

    Keys may be written as in the schema (`sample_steps`) or in protobuf's lower camel case (`sampleSteps`); null
    means left out.

    Raises:
        InvalidRequestJson: not JSON, not an object, or a value of the wrong type or out of its type's range.
    """
    try:
        body = json.loads(text)
    except UnicodeDecodeError:
        raise InvalidRequestJson("", "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestJson("", f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequestJson("", "the body is nested too deeply") from None
    unknown: list[str] = []
    cleaned = _message(body, generation_service_pb2.GenerateRequest.DESCRIPTOR, "", unknown, 0)
    request = generation_service_pb2.GenerateRequest()
    try:
        json_format.ParseDict(cleaned, request)
    except json_format.ParseError as error:
        raise InvalidRequestJson("", f"the body is no request: {error}") from None
    return ParsedRequest(request, tuple(unknown))


def _message(value: object, descriptor: Descriptor, path: str, unknown: list[str], depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise InvalidRequestJson(path, "nested too deeply")
    if not isinstance(value, Mapping):
        raise InvalidRequestJson(path, f"must be an object, got {_kind(value)}")
    fields = {field.name: field for field in descriptor.fields}
    fields |= {field.json_name: field for field in descriptor.fields}
    cleaned: dict[str, Any] = {}
    for key, item in value.items():
        at = f"{path}.{key}" if path else str(key)
        field = fields.get(key)
        if field is None:
            if len(unknown) < MAX_UNKNOWN:
                unknown.append(at)
            continue
        if item is None:
            continue
        if field.name in cleaned:
            raise InvalidRequestJson(at, "is given twice, under both of its names")
        cleaned[field.name] = _field(item, field, at, unknown, depth)
    return cleaned


def _field(value: object, field: FieldDescriptor, at: str, unknown: list[str], depth: int) -> object:
    if not field.is_repeated:
        return _item(value, field, at, unknown, depth)
    if not isinstance(value, list):
        raise InvalidRequestJson(at, f"must be a list, got {_kind(value)}")
    return [_item(item, field, f"{at}.{index}", unknown, depth) for index, item in enumerate(value)]


def _item(value: object, field: FieldDescriptor, at: str, unknown: list[str], depth: int) -> object:
    kind = field.cpp_type
    if field.message_type is not None:
        return _message(value, field.message_type, at, unknown, depth + 1)
    if kind in _INTEGER_RANGES:
        return _integer(value, kind, at)
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return _number(value, at)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestJson(at, f"must be true or false, got {_kind(value)}")
        return value
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not isinstance(value, str):
            raise InvalidRequestJson(at, f"must be text, got {_kind(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequestJson(at, "holds a lone surrogate, which is no character") from None
        return value
    enum = field.enum_type
    if enum is not None:
        names = [entry.name for entry in enum.values]
        if value not in names and value not in [entry.number for entry in enum.values]:
            raise InvalidRequestJson(at, f"must be one of {', '.join(names)}")
        return value
    raise InvalidRequestJson(at, "cannot be given as JSON")


def _integer(value: object, kind: int, at: str) -> int:
    low, high = _INTEGER_RANGES[kind]
    if isinstance(value, str):
        try:
            value = int(value) if len(value) <= 20 else None
        except ValueError:
            value = None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestJson(at, "must be a whole number")
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
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
