"""Runs a Python module and has every change that it makes below one folder recorded, in order, with its bytes.

The recorder itself is `recorder.c`, built here and loaded with LD_PRELOAD. Python and SQLite both change files
through libc, so that it sees all of it. What is written through a shared mapping it does not see: of the store
that is SQLite's `-shm` file alone, which is rebuilt from the WAL and no part of what a disk has to keep.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("recorder.c")
_HEADER = struct.Struct("=IIIIq")


@dataclass(frozen=True)
class Operation:
    """One successful call."""

    kind: str
    """`c`reate, `w`rite, `t`runcate, `a`llocate, `s`ync, `r`ename, `l`ink, `u`nlink, `d`: make a folder,
    `R`: remove one, `x`: set an attribute."""
    path: str
    """Relative to the folder; empty for the folder itself."""
    second: str = ""
    """Where a rename or a link leads; an attribute's name."""
    offset: int = 0
    """Of a write; the size that a file is truncated or allocated to."""
    data: bytes = b""

    def __str__(self) -> str:
        size = f" {len(self.data)} bytes at {self.offset}" if self.kind == "w" else ""
        return f"{self.kind} {self.path}{' ' if self.second else ''}{self.second}{size}"


def why_not() -> str | None:
    """Why nothing can be recorded on this machine; None where it can."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return "only Linux with glibc loads the recorder"
    return None if shutil.which("cc") else "there is no C compiler (cc) to build the recorder with"


def build(folder: Path) -> Path:
    """Builds the recorder in a folder. Returns the library."""
    library = folder / "recorder.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def record(library: Path, folder: Path, trace: Path, module: str, *arguments: str) -> None:
    """Runs `python -m module` until it ends; what it does below the folder is added to the trace.

    Raises:
        AssertionError: it failed; the message has what it said.
    """
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "CUTS_FOLDER": str(folder.resolve()),
        "CUTS_TRACE": str(trace),
    }
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if ended.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")


def operations(trace: Path, folder: Path) -> Iterator[Operation]:
    """What was recorded, in order.

    Raises:
        AssertionError: files were changed in a way that the recorder does not know.
    """
    prefix = len(str(folder.resolve())) + 1
    data = trace.read_bytes()
    at = 0
    while at < len(data):
        kind, *sizes, offset = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        parts = []
        for size in sizes:
            parts.append(data[at : at + size])
            at += size
        path, second = parts[0].decode()[prefix:], parts[1].decode()
        if chr(kind) == "?":
            raise AssertionError(f"the recorder does not know how to record {second or 'this'} of {path}")
        yield Operation(chr(kind), path, second[prefix:] if chr(kind) in "rl" else second, offset, parts[2])
