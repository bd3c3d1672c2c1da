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
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chromarpc_server.pipeline.progress import Check, never_stop
from chromarpc_server.pipeline.weights.tensor_file import (
    ITEM_BYTES,
    MAX_DIMENSIONS,
    MAX_TENSORS,
    TensorEntry,
    TensorFileError,
    open_regular,
    shown,
)

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_METADATA_ENTRIES = 1_000
MAX_JSON_CONTAINERS = 4 * MAX_TENSORS
"""Braces and brackets in a header, each of which may cost Python a hundred bytes."""
_READ_BYTES = 4 * 1024 * 1024
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as PyTorch's pickles are",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "GGUF",
    b"\x1f\x8b": "compressed by gzip",
    b"<!": "a web page",
    b"<html": "a web page",
    b"version ": "a Git LFS pointer rather than the file",
}
"""How files begin that are renamed to safetensors, or saved in its place."""

Opener = Callable[[], BufferedReader]
"""Opens the file that is meant, each time it is called."""


class SafetensorsError(TensorFileError):
    """The file is not safetensors, is truncated, or lies about its contents. The message names no path."""


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was checked; tensors are read on demand."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(repr=False)
    size_bytes: int
    _header_bytes: int = field(repr=False)
    _header_digest: bytes = field(repr=False)
    _opener: Opener = field(repr=False, compare=False)
    """For `load`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    def read(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU, in the file's order, mapped rather than copied where that is possible.

        Args:
            wanted: names of those to read; every one if None.

        Raises:
            SafetensorsError: the file changed since its header was checked.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in self.tensors:
                    if wanted is None or name in wanted:
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SafetensorsError(f"cannot be read: {error}") from None

    def load(self, wanted: Container[str], check: Check = never_stop) -> tuple[dict[str, Tensor], str]:
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
            with self._opener() as stream:
                before = _version(stream)
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
                        tensors[name] = held.view(entry.torch_dtype).reshape(entry.shape)
                # Bytes of two versions, with one header, would make an adapter that nobody ever saved.
                if stream.read(1) or _version(stream) != before:
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

    def sha256(self, check: Check = never_stop) -> str:
        """Hash of the file's bytes, hexadecimal; `check` is called between pieces and may raise."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            while piece := stream.read(_READ_BYTES):
                check()
                digest.update(piece)
        return digest.hexdigest()


def open_safetensors(path: Path, opener: Opener | None = None) -> SafetensorsFile:
    """Checks a file's header.

    Args:
        path: where the file lies.
        opener: opens it, where the path alone is not to be trusted.

    Raises:
        TensorFileError: saying what is wrong with it.
    """
    opener = opener or partial(open_regular, path)
    try:
        with opener() as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise SafetensorsError(f"not a safetensors file: it has {len(prefix)} bytes")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise SafetensorsError(
                    f"not a safetensors file: its header claims {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
                    f"{_other_format(prefix)}"
                )
            if header_bytes > size - 8:
                raise SafetensorsError(
                    f"truncated: its header claims {header_bytes} bytes, the file has {size - 8} more"
                    f"{_other_format(prefix)}"
                )
            raw = stream.read(header_bytes)
    except OSError as error:
        raise SafetensorsError(f"cannot be read: {error.strerror}") from None
    header = _parse(raw)
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise SafetensorsError(f"{len(header)} tensors, more than {MAX_TENSORS}")
    entries = _entries(header, size - 8 - header_bytes)
    digest = hashlib.sha256(prefix + raw).digest()
    return SafetensorsFile(path, entries, metadata, size, header_bytes, digest, opener)


def _version(stream: BufferedReader) -> tuple[int, int]:
    """What changes when somebody writes to an open file; a new name or another link to it changes neither."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _other_format(prefix: bytes) -> str:
    """What a file that is not safetensors seems to be, as the end of a sentence; empty where that is not known."""
    found = next((name for start, name in _OTHER_FORMATS.items() if prefix.startswith(start)), None)
    return f"; it looks like {found}" if found else ""


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
    for name in header:
        if not _encodable(name):
            raise SafetensorsError(f"its header names a tensor in text that cannot be encoded: {shown(name)}")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's members; the same name twice would let two readers see two files."""
    members: dict[str, object] = {}
    for name, value in pairs:
        if name in members:
            raise SafetensorsError(f"its header has the same name twice: {shown(name)}")
        members[name] = value
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
    entries = {name: _entry(name, described) for name, described in header.items()}
    expected, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].size_bytes)):
        if entry.begin < expected:
            raise SafetensorsError(f"its tensors overlap: {shown(before)} and {shown(name)}")
        if entry.begin > expected:
            raise SafetensorsError(
                f"its tensors leave a gap of {entry.begin - expected} bytes before {shown(name)}"
            )
        expected, before = entry.begin + entry.size_bytes, name
    if expected > data_bytes:
        raise SafetensorsError(
            f"truncated: its tensors claim {expected} bytes, the file has {data_bytes}; "
            f"the last of them is {shown(before)}"
        )
    if expected < data_bytes:
        raise SafetensorsError(f"{data_bytes - expected} bytes at its end belong to no tensor")
    return entries


def _entry(name: str, described: object) -> TensorEntry:
    """One tensor's entry, once everything in it agrees.

    Raises:
        SafetensorsError: naming the tensor and what is wrong with it.
    """
    if not isinstance(described, dict):
        raise SafetensorsError(f"its header describes no tensor under {shown(name)}")
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        which = f": {shown(dtype)}" if isinstance(dtype, str) else ""
        raise SafetensorsError(f"{shown(name)} is of a dtype that is not known{which}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise SafetensorsError(f"{shown(name)} has a shape that cannot be")
    if not _naturals(offsets) or len(offsets) != 2:
        raise SafetensorsError(f"{shown(name)} has offsets that cannot be")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise SafetensorsError(f"{shown(name)} has a shape of {dtype} that its {end - begin} bytes do not make")
    return TensorEntry(dtype, tuple(shape), end - begin, begin)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
