"""Reads GGUF files that nobody vouches for: llama.cpp's format, in which people share quantized checkpoints.

As for safetensors, the header is parsed and bounded here, before anything is allocated: counts and lengths against
the file's own size, known types, whole blocks, offsets inside the file and without overlaps. What the types are
comes from the `gguf` package, whose own reader trusts its file.

Layout, all little-endian: magic, version, counts of tensors and keys; the keys; each tensor's name, sizes (the
fastest first), type and offset; padding; the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from chromarpc_server.pipeline.weights.tensor_file import (
    MAX_DIMENSIONS,
    MAX_TENSORS,
    TensorEntry,
    TensorFileError,
    open_regular,
    shown,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Language models keep their vocabulary in it."""
MAX_KEYS = 10_000
MAX_TEXT_BYTES = 65_535
"""Of a name, and of text that is kept."""
MAX_ARRAY_TEXTS = 1_000_000
MAX_KEPT_ITEMS = 16
"""Longer arrays are skipped: a vocabulary is not looked at."""
MAX_ALIGNMENT = 1024 * 1024
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its shape, where the tool that wrote the file reshaped it to make whole blocks."""

PLAIN_TYPES: Mapping[GGMLQuantizationType, str] = {
    GGMLQuantizationType.F32: "F32", GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16",
    GGMLQuantizationType.F64: "F64", GGMLQuantizationType.I8: "I8", GGMLQuantizationType.I16: "I16",
    GGMLQuantizationType.I32: "I32", GGMLQuantizationType.I64: "I64",
}  # fmt: skip
"""Types whose values are plain numbers, with safetensors' names of them."""
_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}  # fmt: skip


class GgufError(TensorFileError):
    """The file is not GGUF, is truncated, or lies about its contents. The message names no path."""


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was checked; tensors are read on demand."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    """A quantized one as its bytes: `U8`, (rows…, bytes of a row)."""
    types: Mapping[str, GGMLQuantizationType]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Of the tensors once they are dense."""
    metadata: Mapping[str, str] = field(repr=False)
    """The keys: text as it is, numbers and short arrays of numbers as JSON; longer arrays are left out."""
    size_bytes: int
    _header_bytes: int = field(repr=False)
    _header_digest: bytes = field(repr=False)
    _begin: int = field(repr=False)
    """Where the tensors begin, after the header's padding."""

    def read(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `TensorFile.read`."""
        try:
            with open_regular(self.path) as stream:
                self.require_unchanged(stream.fileno())
                if os.fstat(stream.fileno()).st_size != self.size_bytes:
                    raise GgufError("it changed while it was read")
                # Copy on write, which nobody does: torch warns of memory that it must not write to.
                mapped = mmap.mmap(stream.fileno(), self.size_bytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            if isinstance(error, TensorFileError):
                raise
            raise GgufError(f"cannot be read: {error}") from None
        block = torch.frombuffer(mapped, dtype=torch.uint8)
        for name, entry in self.tensors.items():
            if wanted is None or name in wanted:
                begin = self._begin + entry.begin
                yield name, block[begin : begin + entry.size_bytes].view(entry.torch_dtype).view(entry.shape)

    def require_unchanged(self, descriptor: int) -> int:
        """See `TensorFile.require_unchanged`."""
        if hashlib.sha256(os.pread(descriptor, self._header_bytes, 0)).digest() != self._header_digest:
            raise GgufError("it changed while it was read")
        return self._begin


def open_gguf(path: Path) -> GgufFile:
    """Checks a file's header.

    Raises:
        TensorFileError: saying what is wrong with it.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            return _parse(path, _Cursor(stream, size), size)
    except OSError as error:
        raise GgufError(f"cannot be read: {error.strerror}") from None


class _Cursor:
    """Takes bytes of the header one after the other, and no more than there are."""

    def __init__(self, stream: BufferedReader, size: int) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._left = min(size, MAX_HEADER_BYTES)
        self._is_cut = size <= MAX_HEADER_BYTES
        self.taken = 0

    @property
    def digest(self) -> bytes:
        """Of what was taken."""
        return self._digest.digest()

    def take(self, count: int) -> bytes:
        """So many bytes."""
        if count > self._left:
            what = "truncated within its header" if self._is_cut else "its header takes more than 64 MiB"
            raise GgufError(what)
        found = self._stream.read(count)
        if len(found) != count:
            raise GgufError("it changed while it was read")
        self._digest.update(found)
        self._left -= count
        self.taken += count
        return found

    def number(self, code: str) -> int:
        """A whole number."""
        (value,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return int(value)

    def text(self) -> bytes:
        """Bytes with their count before them."""
        return self.take(self.number("<Q"))

    def name(self, what: str) -> str:
        """Text that names something."""
        raw = self.text()
        if not raw or len(raw) > MAX_TEXT_BYTES:
            raise GgufError(f"{what} has a name of {len(raw)} bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GgufError(f"{what} has a name that is not text") from None


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    if size < 24 or cursor.take(4) != MAGIC:
        raise GgufError("not a GGUF file")
    version = cursor.number("<I")
    if version not in VERSIONS:
        order = "of a big-endian machine" if version & 0xFFFF == 0 and version else f"of version {version}"
        raise GgufError(f"a GGUF file {order}, which is not read")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count > MAX_TENSORS:
        raise GgufError(f"{tensor_count} tensors, more than {MAX_TENSORS}")
    if key_count > MAX_KEYS:
        raise GgufError(f"{key_count} keys, more than {MAX_KEYS}")
    metadata = _metadata(cursor, key_count)
    alignment = _alignment(metadata)
    described = _described(cursor, tensor_count, metadata)
    begin = -(-cursor.taken // alignment) * alignment
    _require_room(described, alignment, size - begin)
    return GgufFile(
        path,
        tensors={name: found.entry for name, found in described.items()},
        types={name: found.type for name, found in described.items()},
        shapes={name: found.shape for name, found in described.items()},
        metadata=metadata,
        size_bytes=size,
        _header_bytes=cursor.taken,
        _header_digest=cursor.digest,
        _begin=begin,
    )


def _metadata(cursor: _Cursor, count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.name("a key")
        if key in seen:
            raise GgufError(f"its header has the same key twice: {shown(key)}")
        seen.add(key)
        value = _value(cursor, key)
        if value is not None:
            found[key] = value
    return found


def _value(cursor: _Cursor, key: str) -> str | None:
    """A key's value; None for one that is skipped."""
    kind = _kind(cursor, key)
    if kind == GGUFValueType.STRING:
        raw = cursor.text()
        return raw.decode("utf-8", errors="replace") if len(raw) <= MAX_TEXT_BYTES else None
    if kind != GGUFValueType.ARRAY:
        return _number(cursor, kind)
    items, count = _kind(cursor, key), cursor.number("<Q")
    if items == GGUFValueType.ARRAY:
        raise GgufError(f"the key {shown(key)} holds arrays of arrays")
    if items == GGUFValueType.STRING:
        if count > MAX_ARRAY_TEXTS:
            raise GgufError(f"the key {shown(key)} holds {count} texts, more than {MAX_ARRAY_TEXTS}")
        for _ in range(count):
            cursor.text()
        return None
    if count > MAX_KEPT_ITEMS:
        cursor.take(count * struct.calcsize(_SCALARS[items]))
        return None
    return f"[{', '.join(_number(cursor, items) for _ in range(count))}]"


def _kind(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise GgufError(f"the key {shown(key)} is of a type that is not known: {number}") from None


def _number(cursor: _Cursor, kind: GGUFValueType) -> str:
    (value,) = struct.unpack(_SCALARS[kind], cursor.take(struct.calcsize(_SCALARS[kind])))
    return json.dumps(value)


def _alignment(metadata: Mapping[str, str]) -> int:
    text = metadata.get("general.alignment", str(GGUF_DEFAULT_ALIGNMENT))
    alignment = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if alignment % 8 or alignment & (alignment - 1) or not 0 < alignment <= MAX_ALIGNMENT:
        raise GgufError(f"an alignment of {text[:20]} bytes cannot be")
    return alignment


@dataclass(frozen=True)
class _Described:
    entry: TensorEntry
    type: GGMLQuantizationType
    shape: tuple[int, ...]


def _described(cursor: _Cursor, count: int, metadata: Mapping[str, str]) -> dict[str, _Described]:
    found: dict[str, _Described] = {}
    for _ in range(count):
        name = cursor.name("a tensor")
        if name in found:
            raise GgufError(f"its header has the same name twice: {shown(name)}")
        dimensions = cursor.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise GgufError(f"{shown(name)} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(dimensions)]))
        found[name] = _tensor(name, shape, cursor.number("<I"), cursor.number("<Q"), metadata)
    return found


def _tensor(
    name: str, shape: tuple[int, ...], type_number: int, begin: int, metadata: Mapping[str, str]
) -> _Described:
    if math.prod(shape) >= 2**62 or begin >= 2**62:
        raise GgufError(f"{shown(name)} has a shape or an offset that cannot be")
    try:
        kind = GGMLQuantizationType(type_number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise GgufError(f"{shown(name)} is of a type that is not known: {type_number}") from None
    row = shape[-1] if shape else 1
    if row % block:
        raise GgufError(f"{shown(name)} has rows of {row} values, which {kind.name} blocks of {block} do not make")
    dense = _original_shape(name, shape, metadata)
    plain = PLAIN_TYPES.get(kind)
    stored = dense if plain else (*shape[:-1], row // block * block_bytes)
    size = math.prod(shape) // block * block_bytes
    return _Described(TensorEntry(plain or "U8", stored, size, begin), kind, dense)


def _original_shape(name: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> tuple[int, ...]:
    noted = metadata.get(f"{ORIGINAL_SHAPE}{name}")
    if noted is None:
        return shape
    try:
        original = tuple(int(size) for size in json.loads(noted))
    except (ValueError, TypeError, OverflowError, RecursionError):
        original = (-1,)
    if (
        len(original) > MAX_DIMENSIONS
        or any(size < 0 for size in original)
        or math.prod(original) != math.prod(shape)
    ):
        raise GgufError(f"{shown(name)} has an original shape that cannot be")
    return original


def _require_room(described: Mapping[str, _Described], alignment: int, data_bytes: int) -> None:
    """Refuses tensors that overlap, lie between the steps of the alignment or reach beyond the file's end."""
    expected, before = 0, ""
    for name, found in sorted(described.items(), key=lambda item: (item[1].entry.begin, item[1].entry.size_bytes)):
        entry = found.entry
        if entry.begin % alignment:
            raise GgufError(f"{shown(name)} does not lie on a multiple of {alignment} bytes")
        if entry.begin < expected:
            raise GgufError(f"its tensors overlap: {shown(before)} and {shown(name)}")
        expected, before = entry.begin + entry.size_bytes, name
    if expected > data_bytes:
        raise GgufError(
            f"truncated: its tensors claim {expected} bytes, the file has {max(data_bytes, 0)}; "
            f"the last of them is {shown(before)}"
        )
