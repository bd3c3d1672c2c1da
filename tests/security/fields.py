"""Messages with any value in any field, made from the descriptors: a new field is fuzzed by being there."""

from __future__ import annotations

import struct
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

MAX_DEPTH = 3
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
WORDS = (
    "",
    "chroma-mini",
    "[trigger] a red circle",
    "..",
    "/etc/passwd",
    "a\0b",
    "a/" * 600,
    "sha256:" + "0" * 64,
    "0" * 64,
    "http://127.0.0.1:1/a",
    "https://[::1]/a",
    "http://",
    "Euler",
    "flowmatch",
    "Default",
    "low",
    "exact",
    "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    "W10=",
    "x" * 70_000,
    "\U0001f600\u202e\ufeff",
)
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
NUMBERS = (0, 1, -1, 2, 64, 256, 4096, 2**31 - 1)


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth + 1)
    if field.enum_type is not None:
        return st.sampled_from([*(value.number for value in field.enum_type.values), -1, 99, 2**31 - 1])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXT
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        near = [number for number in NUMBERS if low <= number <= high]
        return st.one_of(st.sampled_from([*near, low, high]), st.integers(low, high))
    return st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf"), -1e308]),
        st.floats(width=32 if field.type == FieldDescriptor.TYPE_FLOAT else 64),
    )


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Any message of a kind; every field may be left out."""

    @st.composite
    def build(draw: Any) -> Message:
        message = message_factory.GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if depth >= MAX_DEPTH and field.message_type is not None:
                continue
            if not draw(st.booleans()):
                continue
            if field.is_repeated:
                for value in draw(st.lists(values(field, depth), max_size=3)):
                    own = getattr(message, field.name)
                    own.add().CopyFrom(value) if field.message_type is not None else own.append(value)
            elif field.message_type is not None:
                getattr(message, field.name).CopyFrom(draw(values(field, depth)))
            else:
                setattr(message, field.name, draw(values(field, depth)))
        return message

    return build()


def damaged(data: bytes, at: int, by: int) -> bytes:
    """Bytes with one of them changed, or cut off there."""
    if not data:
        return struct.pack("B", by)
    at %= len(data)
    return data[:at] if by == 0 else data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]
