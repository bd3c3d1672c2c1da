"""A disk that can be filled: a small tmpfs where this user may mount one, else a limit on the server's files."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

TMPFS_BYTES = 256 * 1024**2
FILLER = "filler"
RESERVE_BYTES = 16 * 1024**2
"""What the server is to keep free on it."""


class Disk:
    """Where the server keeps its data."""

    def __init__(self, folder: Path, how: str) -> None:
        """See `disk`."""
        self.folder = folder
        self.how = how

    @property
    def holds_through_starts(self) -> bool:
        """Whether it stays full for the process that comes after the one that met it full."""
        return self.how == "tmpfs"

    def fill_again(self) -> None:
        """Takes what was given up since it was filled."""
        _fill(self.folder / FILLER)

    @contextlib.contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """No room is left inside; `pid` is the server's process."""
        if self.how == "tmpfs":
            filler = self.folder / FILLER
            try:
                _fill(filler)
                yield
            finally:
                filler.unlink(missing_ok=True)
        else:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))  # no byte beyond a file's first
            try:
                yield
            finally:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """A disk below a folder; a tmpfs is gone in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={TMPFS_BYTES},mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield Disk(folder, "tmpfs" if mounted else "RLIMIT_FSIZE")
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(path: Path) -> None:
    """Takes all there is, page by page in the end, since others write meanwhile."""
    with path.open("ab", buffering=0) as file:
        for size in (1024**2, 4096, 1):
            block, failures = bytes(size), 0
            while failures < 3:
                try:
                    failures = failures if file.write(block) == size else failures + 1
                except OSError:
                    failures += 1
        os.fsync(file.fileno())
