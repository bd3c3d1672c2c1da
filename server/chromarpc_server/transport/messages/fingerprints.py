"""What tells one request from another under the same request id.

A fingerprint is a hash over a form of the request that is written here, field by field, rather than over the bytes
that protobuf makes of it: those may be others in another version or language. Stored fingerprints outlive the
server that made them, so this form is not changed; another one gets another prefix.

    message   { name value … # number wire-type value … }   set fields by name, then unknown ones by number
    list      [ value … ]                                   in order
    map       < key value … >                               by key as written here
    scalars   b0 b1  i<int>;  e<number>;  d<float.hex()>;  s<length>:<UTF-8>  y<length>:<bytes>

A field that is not set leaves no trace, so that a new one changes no request that does not use it. A message that
is set and empty is not one that is not set. 0.0 and -0.0 are one number, and so are all NaNs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from chromarpc.v1 import generation_service_pb2
from chromarpc_server.jobs.submission import FINGERPRINT_PREFIX, Fingerprint

_NOT_ASKED_FOR = frozenset({"request_id", "hf_token"})
"""Fields of a request that say nothing of what is drawn."""
_LENGTH_DELIMITED, _GROUP = 2, 3


def fingerprint(request: generation_service_pb2.GenerateRequest) -> Fingerprint:
    """Of what a request asks for; of neither its id nor its secrets."""
    digest = hashlib.sha256(canonical_form(request, without=_NOT_ASKED_FOR)).hexdigest()
    return Fingerprint(FINGERPRINT_PREFIX + digest, legacy=_legacy(request))


def canonical_form(message: Message, *, without: frozenset[str] = frozenset()) -> bytes:
    """The message as the module describes; `without`: fields of the message itself that are left out."""
    out = bytearray()
    _add_message(out, message, without)
    return bytes(out)


def _legacy(request: generation_service_pb2.GenerateRequest) -> str:
    """As it was made up to 0.1.0: of protobuf's own bytes."""
    asked = generation_service_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.ClearField("hf_token")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _add_message(out: bytearray, message: Message, without: frozenset[str] = frozenset()) -> None:
    out += b"{"
    for field, value in sorted(message.ListFields(), key=lambda item: item[0].name):
        if field.name in without:
            continue
        _add_text(out, field.name)
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            _add_map(out, kind, value)
        elif field.is_repeated:
            _add_list(out, field, value)
        else:
            _ADDERS[field.cpp_type](out, value)
    _add_unknown(out, UnknownFieldSet(message))
    out += b"}"


def _add_list(out: bytearray, field: FieldDescriptor, values: Iterable[object]) -> None:
    add = _ADDERS[field.cpp_type]
    out += b"["
    for value in values:
        add(out, value)
    out += b"]"


def _add_map(out: bytearray, entry_type: Descriptor, values: Mapping[object, object]) -> None:
    add_key, add_value = (_ADDERS[entry_type.fields_by_name[part].cpp_type] for part in ("key", "value"))
    entries = []
    for key, value in values.items():
        entry = bytearray()
        add_key(entry, key)
        add_value(entry, value)
        entries.append(entry)
    # Of two keys as written here none begins with the other, so values do not decide on the order.
    out += b"<" + b"".join(sorted(entries)) + b">"


def _add_unknown(out: bytearray, found: UnknownFieldSet) -> None:
    fields = [found[index] for index in range(len(found))]
    # Those with one number are the entries of a list, and stay in order.
    for field in sorted(fields, key=lambda field: field.field_number):
        out += b"#%d %d " % (field.field_number, field.wire_type)
        if field.wire_type == _GROUP:
            out += b"{"
            _add_unknown(out, field.data)
            out += b"}"
        elif field.wire_type == _LENGTH_DELIMITED:
            _add_bytes(out, field.data)
        else:
            _add_integer(out, field.data)


def _add_bool(out: bytearray, value: bool) -> None:
    out += b"b1" if value else b"b0"


def _add_integer(out: bytearray, value: int) -> None:
    out += b"i%d;" % value


def _add_enum(out: bytearray, value: int) -> None:
    out += b"e%d;" % value


def _add_float(out: bytearray, value: float) -> None:
    exact = "nan" if math.isnan(value) else (value or 0.0).hex()
    out += b"d%b;" % exact.encode()


def _add_text(out: bytearray, value: str) -> None:
    data = value.encode()
    out += b"s%d:%b" % (len(data), data)


def _add_bytes(out: bytearray, value: bytes) -> None:
    out += b"y%d:%b" % (len(value), value)


def _add_string(out: bytearray, value: str | bytes) -> None:
    """`CPPTYPE_STRING` is both."""
    if isinstance(value, str):
        _add_text(out, value)
    else:
        _add_bytes(out, value)


_ADDERS: dict[int, Callable[..., None]] = {
    FieldDescriptor.CPPTYPE_BOOL: _add_bool,
    FieldDescriptor.CPPTYPE_INT32: _add_integer,
    FieldDescriptor.CPPTYPE_INT64: _add_integer,
    FieldDescriptor.CPPTYPE_UINT32: _add_integer,
    FieldDescriptor.CPPTYPE_UINT64: _add_integer,
    FieldDescriptor.CPPTYPE_ENUM: _add_enum,
    FieldDescriptor.CPPTYPE_FLOAT: _add_float,
    FieldDescriptor.CPPTYPE_DOUBLE: _add_float,
    FieldDescriptor.CPPTYPE_STRING: _add_string,
    FieldDescriptor.CPPTYPE_MESSAGE: _add_message,
}
