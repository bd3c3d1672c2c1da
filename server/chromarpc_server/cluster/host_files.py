"""A host's folder of adapters, named by their hashes, which all actors of the host share.

A file is fetched once, by whichever actor has its lock, and appears whole. Its bytes are compared with its hash
whenever they are read, as an upload's are. The least recently used ones leave first.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

from filelock import FileLock, Timeout

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.names import SUFFIX, require_hash
from chromarpc_server.cluster.messages import HashedFile
from chromarpc_server.domain.errors import LoraChanged
from chromarpc_server.durable import make_folder

IN_USE_S = 600.0
"""A file that was asked for so lately does not leave: an actor may be about to read it."""
LOCK_POLL_S = 0.05
LOCK_WAIT_S = 30.0
"""After which a file is fetched without the lock: whoever has it may have been stopped."""
ABANDONED_S = 24 * 3600.0
"""A file that was begun so long ago has nobody any more who goes on with it."""

_KEPT = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_PASSING = re.compile(r"[0-9a-f]{16}\.part|[0-9a-f]{64}\.lock")
"""What else is in the folder is not ours to delete."""

Pieces = Callable[[], Awaitable[tuple[bytes, bool]]]
"""The next bytes of a file, and whether they are the last."""


class HostFiles:
    """Lives on an actor's event loop; touches the disk on threads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Touches no file.

        Args:
            folder: this user's; made where there is none.
            max_bytes: of all files together, but for those in use.
        """
        self._folder = folder
        self._max_bytes = max_bytes

    async def have(
        self, wanted: HashedFile, fetch: Callable[[], Awaitable[Pieces]], check: Callable[[], None] = lambda: None
    ) -> AdapterFile:
        """The file; fetched if the host does not have it.

        Args:
            wanted: which.
            fetch: begins to fetch it.
            check: called while another actor fetches it; may raise to stop.

        Raises:
            ChromaError: it cannot be fetched, or what `check` raised.
            OSError: the folder cannot be written.
        """
        path = self._folder / f"{require_hash(wanted.sha256, 'sha256')}{SUFFIX}"
        if await asyncio.to_thread(_touch, path, wanted.size_bytes):
            return await asyncio.to_thread(_as_file, path, wanted)
        await asyncio.to_thread(self._make_room, wanted.size_bytes)
        lock = FileLock(path.with_suffix(".lock"), thread_local=False)
        await _acquire(lock, check)
        try:
            # Another actor may have fetched it while this one waited.
            if not await asyncio.to_thread(_touch, path, wanted.size_bytes):
                await self._fetch(path, wanted, await fetch())
        finally:
            lock.release()
        return await asyncio.to_thread(_as_file, path, wanted)

    def forget(self, sha256: str) -> None:
        """Deletes a file that was found to have other bytes."""
        with suppress(OSError):
            (self._folder / f"{sha256}{SUFFIX}").unlink()

    async def _fetch(self, path: Path, wanted: HashedFile, pieces: Pieces) -> None:
        part = self._folder / f"{secrets.token_hex(8)}.part"
        digest, size, is_last = hashlib.sha256(), 0, False
        try:
            with await asyncio.to_thread(_open_new, part) as stream:
                while not is_last:
                    data, is_last = await pieces()
                    size += len(data)
                    if size > wanted.size_bytes:
                        break
                    digest.update(data)
                    await asyncio.to_thread(stream.write, data)
            if size != wanted.size_bytes or digest.hexdigest() != wanted.sha256:
                raise LoraChanged("the adapter was written anew while it was sent to the device's host")
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        make_folder(self._folder)
        now = time.time()
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                if _KEPT.fullmatch(path.name):
                    files.append((status.st_mtime, status.st_size, path))
                elif _PASSING.fullmatch(path.name) and now - status.st_mtime > ABANDONED_S:
                    path.unlink()
        held = sum(size for _, size, _ in files)
        for used_at, size, path in sorted(files):
            if held + needed <= self._max_bytes or now - used_at < IN_USE_S:
                break
            with suppress(OSError):
                path.unlink()
                held -= size


async def _acquire(lock: FileLock, check: Callable[[], None]) -> None:
    until = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < until:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            check()
            await asyncio.sleep(LOCK_POLL_S)
        else:
            return


def _open_new(part: Path) -> BufferedWriter:
    return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _touch(path: Path, size_bytes: int) -> bool:
    """Notes that a file is used; False where it is not there, or not whole."""
    try:
        if path.is_symlink() or path.stat().st_size != size_bytes:
            return False
        os.utime(path)
    except OSError:
        return False
    return True


def _as_file(path: Path, wanted: HashedFile) -> AdapterFile:
    return AdapterFile.of(path, "path", sha256=wanted.sha256)
