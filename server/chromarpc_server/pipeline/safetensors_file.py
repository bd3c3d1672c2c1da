"""Reads safetensors files that nobody vouches for.

The header is parsed and bounded here, before the safetensors library maps the file: sizes against the file's
own, offsets without gaps or overlaps, known dtypes, shapes that agree with their bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_METADATA_ENTRIES = 1_000
_READ_BYTES = 4 * 1024 * 1024

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class SafetensorsError(ValueError):
    """The file is not safetensors, is truncated, or lies about its contents. The message names no path."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was checked; tensors are read on demand."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(repr=False)
    size_bytes: int

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
        size = path.stat().st_size
        with path.open("rb") as stream:
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
    return SafetensorsFile(path, _entries(header, size - 8 - header_bytes), metadata, size)


def _parse(raw: bytes) -> dict[str, object]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise SafetensorsError("not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise SafetensorsError("not a safetensors file: its header is not an object")
    return header


def _metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA_ENTRIES:
        raise SafetensorsError("its header metadata cannot be used")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
        raise SafetensorsError("its header metadata is not text")
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
    bad = SafetensorsError(f"its header describes a tensor that cannot be: {name[:100]!r}")
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
    return TensorEntry(dtype, tuple(shape), offsets[1] - offsets[0]), offsets[0], offsets[1]


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
