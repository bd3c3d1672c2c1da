"""Reads safetensors files that nobody vouches for.

The header is parsed and bounded here, before anything is allocated: sizes against the file's own, offsets
without gaps or overlaps, known dtypes, shapes that agree with their bytes. Then there are two ways in:

- `read` maps the file through the safetensors library: for the server's own checkpoints, which are large.
- `load` copies what is wanted through one descriptor and hashes every byte on the way: for files that somebody
  may change or cut while they are read. A mapped file that shrinks would kill the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_METADATA_ENTRIES = 1_000
MAX_JSON_CONTAINERS = 4 * MAX_TENSORS
"""Braces and brackets in a header, each of which may cost Python a hundred bytes."""
_READ_BYTES = 4 * 1024 * 1024

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsError(ValueError):
    """The file is not safetensors, is truncated, or lies about its contents. The message names no path."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str
    """As the format names it: `BF16`."""
    shape: tuple[int, ...]
    size_bytes: int
    begin: int
    """Where its bytes begin, counted from the header's end."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch names it."""
        return _DTYPES[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was checked; tensors are read on demand."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(repr=False)
    size_bytes: int
    _header_bytes: int = field(repr=False)
    _header_digest: bytes = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, on the CPU, in the file's order, mapped rather than copied where that is possible.

        Raises:
            SafetensorsError: the file changed since its header was checked.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in self.tensors:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SafetensorsError(f"cannot be read: {error}") from None

    def load(
        self, wanted: Container[str], check: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Tensor], str]:
        """Copies some tensors into memory, and hashes the file; the tensors are what was hashed.

        Args:
            wanted: names of the tensors to keep.
            check: called between pieces; may raise to stop.

        Returns:
            The tensors by name, on the CPU, and the SHA-256 of the file's bytes, hexadecimal.

        Raises:
            SafetensorsError: the file changed since its header was checked.
        """
        changed = SafetensorsError("it changed while it was read")
        tensors: dict[str, Tensor] = {}
        try:
            with _open(self.path) as stream:
                header = stream.read(8 + self._header_bytes)
                if hashlib.sha256(header).digest() != self._header_digest:
                    raise changed
                digest = hashlib.sha256(header)
                spare = torch.empty(_READ_BYTES, dtype=torch.uint8)
                for name, entry in sorted(
                    self.tensors.items(), key=lambda item: (item[1].begin, item[1].size_bytes)
                ):
                    keep = name in wanted
                    held = torch.empty(entry.size_bytes, dtype=torch.uint8) if keep else spare
                    space: memoryview = held.numpy().data
                    done = 0
                    while done < entry.size_bytes:
                        check()
                        begin = done if keep else 0
                        piece = space[begin : begin + min(_READ_BYTES, entry.size_bytes - done)]
                        if stream.readinto(piece) != len(piece):
                            raise changed
                        digest.update(piece)
                        done += len(piece)
                    if keep:
                        tensors[name] = held.view(_DTYPES[entry.dtype]).reshape(entry.shape)
                if stream.read(1):
                    raise changed
        except OSError as error:
            raise SafetensorsError(f"cannot be read: {error.strerror}") from None
        return tensors, digest.hexdigest()

    def require_unchanged(self, descriptor: int) -> int:
        """Looks at the header of the file again. Returns where the tensors begin.

        Raises:
            SafetensorsError: it is another one.
            OSError: it cannot be read.
        """
        begin = 8 + self._header_bytes
        if hashlib.sha256(os.pread(descriptor, begin, 0)).digest() != self._header_digest:
            raise SafetensorsError("it changed while it was read")
        return begin

    def sha256(self, check: Callable[[], None] = lambda: None) -> str:
        """Hash of the file's bytes, hexadecimal; `check` is called between pieces and may raise."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            while piece := stream.read(_READ_BYTES):
                check()
                digest.update(piece)
        return digest.hexdigest()


def open_safetensors(path: Path) -> SafetensorsFile:
    """Checks a file's header.

    Raises:
        SafetensorsError: saying what is wrong with it.
    """
    try:
        with _open(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise SafetensorsError(f"not a safetensors file: it has {len(prefix)} bytes")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise SafetensorsError(
                    f"not a safetensors file: its header claims {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
                )
            if header_bytes > size - 8:
                raise SafetensorsError(
                    f"truncated: its header claims {header_bytes} bytes, the file has {size - 8} more"
                )
            raw = stream.read(header_bytes)
    except OSError as error:
        raise SafetensorsError(f"cannot be read: {error.strerror}") from None
    header = _parse(raw)
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise SafetensorsError(f"{len(header)} tensors, more than {MAX_TENSORS}")
    entries = _entries(header, size - 8 - header_bytes)
    return SafetensorsFile(path, entries, metadata, size, header_bytes, hashlib.sha256(prefix + raw).digest())


def _open(path: Path) -> BufferedReader:
    """Opens a regular file and nothing else; a pipe would keep its reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SafetensorsError("not a regular file")
    return os.fdopen(descriptor, "rb")


def _parse(raw: bytes) -> dict[str, object]:
    if raw.count(b"{") + raw.count(b"[") > MAX_JSON_CONTAINERS:
        raise SafetensorsError("its header holds more objects than tensors can have")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except SafetensorsError:
        raise
    except (ValueError, RecursionError):
        raise SafetensorsError("not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise SafetensorsError("not a safetensors file: its header is not an object")
    if not all(_encodable(name) for name in header):
        raise SafetensorsError("its header names tensors in text that cannot be encoded")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's members; the same name twice would let two readers see two files."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise SafetensorsError("its header has the same name twice")
    return members


def _encodable(text: str) -> bool:
    """Whether text has no lone surrogate, which JSON can spell and nothing downstream can send."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA_ENTRIES:
        raise SafetensorsError("its header metadata cannot be used")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
        raise SafetensorsError("its header metadata is not text")
    if not all(_encodable(key) and _encodable(value) for key, value in metadata.items()):
        raise SafetensorsError("its header metadata is text that cannot be encoded")
    return dict(metadata)


def _entries(header: Mapping[str, object], data_bytes: int) -> dict[str, TensorEntry]:
    spans: list[tuple[int, int]] = []
    entries: dict[str, TensorEntry] = {}
    for name, described in header.items():
        entry, begin, end = _entry(name, described)
        entries[name] = entry
        spans.append((begin, end))
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise SafetensorsError("its tensors overlap or leave gaps")
        expected = end
    if expected > data_bytes:
        raise SafetensorsError(f"truncated: its tensors claim {expected} bytes, the file has {data_bytes}")
    if expected < data_bytes:
        raise SafetensorsError(f"{data_bytes - expected} bytes at its end belong to no tensor")
    return entries


def _entry(name: str, described: object) -> tuple[TensorEntry, int, int]:
    bad = SafetensorsError(f"its header describes a tensor that cannot be: {name[:100]!a}")
    if not isinstance(described, dict):
        raise bad
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or dtype not in _ITEM_BYTES
        or not _naturals(shape)
        or len(shape) > MAX_DIMENSIONS
        or not _naturals(offsets)
        or len(offsets) != 2
        or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]
    ):
        raise bad
    return TensorEntry(dtype, tuple(shape), offsets[1] - offsets[0], offsets[0]), offsets[0], offsets[1]


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
