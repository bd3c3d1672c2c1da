"""An adapter's file as it was when a job was admitted, and whether it still is.

A file below the root is known by what the file system says of it, an uploaded or downloaded one by the hash in
its name: its bytes are compared with that whenever they are read. A disk that loses bits changes neither size nor
time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePath

from chromarpc_server.adapters.beneath import open_below, status_below
from chromarpc_server.adapters.damage import report_damage
from chromarpc_server.domain.errors import LoraChanged, LoraContentChanged, LoraDamaged, LoraNotFound
from chromarpc_server.domain.plan import PlannedLora

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""What a system says of a path that leads nowhere any more, or through a link."""
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A file as it was when a job was admitted.

    Two of them are equal where they stand for the same bytes: they are named by the same hash, or are the same
    version of a file below the root. It is found and opened below its folder without following a link, so that
    someone who can write there cannot make the server read a file elsewhere.
    """

    path: Path
    """Without links below the folder."""
    size_bytes: int
    modified_ns: int
    inode: int
    device: int
    folder: Path = field(repr=False)
    """It lies below this one."""
    sha256: str | None = None
    """The hash that the file is named by; None for one below the root."""

    @classmethod
    def of(cls, path: Path, field: str, *, below: Path | None = None, sha256: str | None = None) -> AdapterFile:
        """Looks at the file.

        Args:
            path: without links below the folder.
            field: of the request, to blame.
            below: the folder that the file lies below; by default the one that it lies in.
            sha256: the hash that it is named by, if it is.

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
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, folder, sha256)

    @property
    def _identity(self) -> tuple[object, ...]:
        if self.sha256 is not None:
            return (self.sha256,)
        return (self.path, self.size_bytes, self.modified_ns, self.inode, self.device)

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, AdapterFile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def is_same(self, status: os.stat_result) -> bool:
        """Whether this is what the file system says of the same version of the file.

        Of one that is named by its hash every version counts as the same, until it is read.
        """
        if self.sha256 is not None:
            return stat.S_ISREG(status.st_mode)
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

    def require_read(self, sha256: str) -> None:
        """Checks that what was read is what this file stands for.

        Args:
            sha256: of the bytes that were read, hexadecimal.

        Raises:
            LoraDamaged: the file is named by another hash.
            LoraChanged: it was written anew, or went away; of a file below the root.
        """
        if self.sha256 is None:
            self._require_still()
        elif sha256 != self.sha256:
            raise self.damage()

    def require_content(self, stream: BufferedReader, check: Callable[[], None] = lambda: None) -> None:
        """Reads what `open` gave from its beginning to its end, and compares it with the hash in the file's name.

        Args:
            stream: as `open` gave it, of a file that is named by its hash.
            check: called between pieces; may raise to stop.

        Raises:
            LoraDamaged: the hash is another one, or the disk cannot read the file.
            OSError: it cannot be read for another reason.
        """
        digest = hashlib.sha256()
        try:
            stream.seek(0)
            while piece := stream.read(_READ_BYTES):
                check()
                digest.update(piece)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise self.damage() from None
        self.require_read(digest.hexdigest())

    def _require_still(self) -> None:
        try:
            status = status_below(self.folder, self._below)
        except OSError:
            raise _gone() from None
        if not self.is_same(status):
            raise _written_anew()

    def damage(self) -> LoraDamaged:
        """Counts and logs that its bytes are not those of its hash; the error that says so."""
        sha256 = self.sha256 or ""
        report_damage(sha256, "content")
        return LoraDamaged(
            f"the server's file of the adapter sha256:{sha256} is damaged: its bytes have another hash; upload "
            "the same file again, which heals it",
            metadata={"sha256": sha256},
        )

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
