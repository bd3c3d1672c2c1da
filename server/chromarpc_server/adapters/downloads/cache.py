"""The folder of downloaded adapters: files in use stay, and of the others those used longest ago are evicted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.process_folder import PART_SUFFIX
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.durable import is_out_of_space


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
    room: DiskRoom | None = None
    """Asked before each block: a host need not say how large a file is."""

    def write(self, block: bytes) -> None:
        """Appends a block.

        Raises:
            DiskFull: too little would be left on the disk.
            OSError: the disk does not take it.
        """
        if self.room is not None:
            self.room.require(len(block), "this adapter")
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
    """Bounds a content store in size. Belongs to one process; any thread may call it.

    A holder, of any kind, keeps one file from being evicted.
    """

    def __init__(self, store: ContentStore, max_bytes: int, room: DiskRoom | None = None) -> None:
        """Makes the folder, and deletes what interrupted downloads of earlier versions left in it.

        Args:
            store: of downloads.
            max_bytes: of all files; exceeded by files in use, and by downloads in progress.
            room: on its disk; None is not asked.

        Raises:
            OSError: the folder cannot be used.
        """
        self._store = store
        self._max_bytes = max_bytes
        self._room = room
        self._leases: dict[object, str] = {}
        """Holder to hash."""
        self._evicting = threading.Lock()
        """Held while it is decided which files go, and while it is seen that one is there."""
        try:
            store.make_folder()
        except OSError as error:
            if not is_out_of_space(error):  # what is there can be used on a full disk too
                raise
        for abandoned in store.folder.glob(f"*{PART_SUFFIX}"):
            abandoned.unlink(missing_ok=True)

    @contextlib.contextmanager
    def part_file(self, expected_bytes: int = 0) -> Iterator[PartFile]:
        """A new file, which is deleted at the end of the context unless `add` took it.

        Args:
            expected_bytes: how large it will be at least.

        Raises:
            DiskFull: too little would be left on the disk.
            OSError: the folder cannot be written.
        """
        if self._room is not None:
            self._room.require(expected_bytes, "this adapter")
        self._store.make_folder()
        path = self._store.unfinished.path() / f"{secrets.token_hex(16)}{PART_SUFFIX}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield PartFile(path, file, room=self._room)
        finally:
            path.unlink(missing_ok=True)

    def keep(self, holder: object, part: PartFile) -> str:
        """Keeps what will be in the place of a whole file until `release`; its hash."""
        sha256 = part.digest.hexdigest()
        self._leases[holder] = sha256
        return sha256

    def add(self, part: PartFile) -> None:
        """Puts a whole file, synced before, in its place; outlasts a power failure.

        Raises:
            OSError: the folder cannot be written.
        """
        self._store.place(part.path, part.digest.hexdigest())

    def hold(self, holder: object, sha256: str) -> bool:
        """Keeps the file with this hash until `release`; False where it is not there."""
        with self._evicting:
            if not self._store.path(sha256).exists():
                return False
            self._leases[holder] = sha256
            return True

    def is_whole(self, sha256: str) -> bool:
        """Whether the file with this hash is there and still has its bytes: reads it.

        Raises:
            OSError: it cannot be read, which says nothing of its bytes.
        """
        return self._store.is_whole(sha256)

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
        with self._evicting:
            files = [(path.stat(), path) for path in self._store.folder.glob("*.safetensors")]
            excess = sum(status.st_size for status, _ in files) - self._max_bytes
            held = set(self._leases.values())
            evicted = []
            for status, path in sorted(files, key=lambda file: file[0].st_atime_ns):
                if excess <= 0:
                    break
                if path.stem not in held:
                    self._store.remove_file(path.stem)
                    evicted.append(path.stem)
                    excess -= status.st_size
        if evicted:
            self._store.drop_notes(evicted)
