"""The folder of downloaded adapters: files in use stay, and of the others those used longest ago are evicted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from chromarpc_server.adapters.content_store import ContentStore


@dataclass(frozen=True, eq=False)
class Downloaded:
    """A file in the cache, which stays there until `release`; a context manager that releases at its end."""

    path: Path
    sha256: str
    """64 lower-case hexadecimal digits."""
    size_bytes: int
    _leases: dict[object, str] = field(repr=False)

    def release(self) -> None:
        """Lets the file be evicted. Any thread may call this, and more than once."""
        self._leases.pop(self, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class CachedFile:
    """A file that was in the cache a moment ago."""

    sha256: str
    size_bytes: int


@dataclass
class PartFile:
    """A file that is being received."""

    path: Path
    file: BinaryIO
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size_bytes: int = 0

    def write(self, block: bytes) -> None:
        """Appends a block.

        Raises:
            OSError: the disk does not take it.
        """
        self.file.write(block)
        self.digest.update(block)
        self.size_bytes += len(block)

    def sync(self) -> None:
        """Makes what was written outlast a power failure.

        Raises:
            OSError: the disk does not take it.
        """
        self.file.flush()
        os.fsync(self.file.fileno())


class DownloadCache:
    """Bounds a content store in size. Belongs to one process and one event loop.

    A holder, of any kind, keeps one file from being evicted.
    """

    def __init__(self, store: ContentStore, max_bytes: int) -> None:
        """Makes the folder, and deletes what an interrupted download left in it.

        Args:
            store: of downloads.
            max_bytes: of all files; exceeded by files in use, and by downloads in progress.

        Raises:
            OSError: the folder cannot be used.
        """
        self._store = store
        self._max_bytes = max_bytes
        self._leases: dict[object, str] = {}
        """Holder to hash."""
        store.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in store.folder.glob("*.part"):
            abandoned.unlink(missing_ok=True)

    @contextlib.contextmanager
    def part_file(self) -> Iterator[PartFile]:
        """A new file in the folder, which is deleted at the end of the context unless `add` took it.

        Raises:
            OSError: the folder cannot be written.
        """
        descriptor, name = tempfile.mkstemp(dir=self._store.folder, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield PartFile(Path(name), file)
        finally:
            Path(name).unlink(missing_ok=True)

    def add(self, part: PartFile) -> str:
        """Puts a whole file in its place; its hash.

        Raises:
            OSError: the folder cannot be written.
        """
        sha256 = part.digest.hexdigest()
        self._store.place(part.path, sha256, part.size_bytes)
        return sha256

    def hold(self, holder: object, sha256: str) -> bool:
        """Keeps the file with this hash until `release`; False where it is not there."""
        if not self._store.path(sha256).exists():
            return False
        self._leases[holder] = sha256
        return True

    def use(self, holder: object, sha256: str) -> CachedFile:
        """Keeps the file with this hash until `release`, and makes it the one that was used last.

        Raises:
            OSError: it is not there.
        """
        self._leases[holder] = sha256
        path = self._store.path(sha256)
        status = path.stat()
        # The access time counts here. The time of change stays: other caches go by that.
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return CachedFile(sha256, status.st_size)

    def release(self, holder: object) -> None:
        """Lets the holder's file be evicted, if there is one."""
        self._leases.pop(holder, None)

    def lend(self, file: CachedFile) -> Downloaded:
        """A file that was just used, held by what is returned."""
        downloaded = Downloaded(self._store.path(file.sha256), file.sha256, file.size_bytes, self._leases)
        self._leases[downloaded] = file.sha256
        return downloaded

    def evict(self) -> None:
        """Deletes the files used longest ago until the rest is within `max_bytes`, but none that is held.

        Raises:
            OSError: the folder cannot be read or written.
        """
        files = [(path.stat(), path) for path in self._store.folder.glob("*.safetensors")]
        excess = sum(status.st_size for status, _ in files) - self._max_bytes
        held = set(self._leases.values())
        for status, path in sorted(files, key=lambda file: file[0].st_atime_ns):
            if excess <= 0:
                break
            if path.stem not in held:
                self._store.remove(path.stem)
                excess -= status.st_size
