"""What files of tensors have in common, whatever their format: a header that was checked, and bytes to read."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
_MAX_NAME = 100
"""Characters of a tensor's name that a message shows."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
ITEM_BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
"""By the name of a dtype, as safetensors spells it."""


class TensorFileError(ValueError):
    """The file is truncated, lies about its contents, or changed. The message names no path."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str
    """As safetensors names it: `BF16`. `U8` where the values are packed in a way that the format alone knows."""
    shape: tuple[int, ...]
    size_bytes: int
    begin: int
    """Where its bytes begin, counted from where the file's tensors do."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch names it."""
        return _DTYPES[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


class TensorFile(Protocol):
    """A file whose header was checked; tensors are read on demand."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """In the file's order."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header says besides."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of every tensor once it is dense."""
        ...

    def read(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU, as they are stored, in the file's order, mapped rather than copied if possible.

        Args:
            wanted: names of those to read; every one if None.

        Raises:
            TensorFileError: the file changed since its header was checked.
        """
        ...

    def require_unchanged(self, descriptor: int) -> int:
        """Looks at the header of the file again. Returns where the tensors begin.

        Raises:
            TensorFileError: it is another one.
            OSError: it cannot be read.
        """
        ...


def shown(name: str) -> str:
    """A tensor's name as a message may carry it: printable and of bounded length."""
    return ascii(name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}...")


def shown_few(names: Sequence[str]) -> str:
    """The first three of several names, as a list."""
    return f"[{', '.join(shown(name) for name in names[:3])}]"


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file and nothing else; a pipe would keep its reader waiting for ever.

    Raises:
        TensorFileError: it is something else.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TensorFileError("not a regular file")
    return os.fdopen(descriptor, "rb")
