"""An adapter's file as it was when a job was admitted, and whether it still is."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePath

from chromarpc_server.adapters.beneath import open_below, status_below
from chromarpc_server.domain.errors import LoraChanged, LoraContentChanged, LoraNotFound
from chromarpc_server.domain.plan import PlannedLora

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""What a system says of a path that leads nowhere any more, or through a link."""


@dataclass(frozen=True)
class AdapterFile:
    """A file as it was when a job was admitted.

    It is found and opened below its folder without following a link, so that someone who can write there cannot
    make the server read a file elsewhere.
    """

    path: Path
    """Without links below the folder."""
    size_bytes: int
    modified_ns: int
    inode: int
    device: int
    folder: Path = field(compare=False, repr=False)
    """It lies below this one."""

    @classmethod
    def of(cls, path: Path, field: str, *, below: Path | None = None) -> AdapterFile:
        """Looks at the file.

        Args:
            path: without links below the folder.
            field: of the request, to blame.
            below: the folder that the file lies below; by default the one that it lies in.

        Raises:
            LoraNotFound: it went away, or is no regular file, or is reached through a link.
        """
        folder = path.parent if below is None else below
        try:
            status = status_below(folder, path.relative_to(folder))
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise LoraNotFound("no such adapter below the server's adapter root", field=field)
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, folder)

    def is_same(self, status: os.stat_result) -> bool:
        """Whether this is what the file system says of the same version of the file."""
        return stat.S_ISREG(status.st_mode) and (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
            status.st_dev,
        ) == (self.size_bytes, self.modified_ns, self.inode, self.device)

    def open(self) -> BufferedReader:
        """Opens this version of the file, and nothing else.

        Raises:
            LoraChanged: it was written anew, or went away.
            OSError: it may not be read.
        """
        try:
            stream = open_below(self.folder, self._below, self.is_same)
        except OSError as error:
            if error.errno in _GONE:
                raise _gone() from None
            raise
        if stream is None:
            raise _written_anew()
        return stream

    def require_still(self) -> None:
        """Looks at the file again.

        Raises:
            LoraChanged: it was written anew, or went away.
        """
        try:
            status = status_below(self.folder, self._below)
        except OSError:
            raise _gone() from None
        if not self.is_same(status):
            raise _written_anew()

    @property
    def _below(self) -> PurePath:
        return self.path.relative_to(self.folder)


def _gone() -> LoraChanged:
    return LoraChanged("the adapter went away while the job waited")


def _written_anew() -> LoraChanged:
    return LoraChanged("the adapter was written anew while the job waited")


def require_expected(lora: PlannedLora, sha256: str, index: int) -> None:
    """Checks the content of a job's adapter, where the request says what it must be.

    Raises:
        LoraContentChanged: blaming `loras.{index}.expected_sha256`.
    """
    if lora.expected_sha256 is not None and lora.expected_sha256 != sha256:
        raise LoraContentChanged(
            "the adapter is another one than the request expects",
            field=f"loras.{index}.expected_sha256",
            metadata={"sha256_expected": lora.expected_sha256, "sha256_now": sha256},
        )
