"""Files that a process has not finished: each process has a folder of its own, and holds a lock while it lives.

Whether a folder's process lives is asked of its lock, never of a clock: neither a step of the clock nor a process
that sleeps for a day makes its files look abandoned.
"""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chromarpc_server.durable import make_folder

PART_SUFFIX = ".part"
_LOCK = "lock"
_TRIES = 5
"""How often another folder is tried because a start of another process took this one for abandoned."""


class ProcessFolder:
    """A folder of this process below one that processes share. Safe to call from any thread."""

    def __init__(self, shared: Path) -> None:
        """Touches no file.

        Args:
            shared: processes' folders lie in it.
        """
        self._shared = shared
        self._making = threading.Lock()
        self._own: Path | None = None
        self._held: FileLock | None = None

    def path(self) -> Path:
        """The folder; made, and locked, by the first call.

        Raises:
            OSError: it cannot be made.
        """
        with self._making:
            if self._own is None:
                self._own, self._held = self._make()
            return self._own

    def remove_abandoned(self) -> None:
        """Deletes what processes that have ended did not finish, and such files of earlier versions."""
        if not self._shared.is_dir():
            return
        for path in sorted(self._shared.iterdir()):
            with suppress(OSError):
                if path.is_symlink():
                    continue
                if path.is_dir():
                    _remove_if_abandoned(path)
                elif path.suffix == PART_SUFFIX:
                    path.unlink()

    def close(self) -> None:
        """Deletes the folder with everything in it; the next call of `path` makes another one."""
        with self._making:
            if self._own is not None and self._held is not None:
                with suppress(OSError):
                    _remove(self._own)
                self._held.release()
            self._own = self._held = None

    def _make(self) -> tuple[Path, FileLock]:
        make_folder(self._shared)
        for _ in range(_TRIES):
            folder = self._shared / secrets.token_hex(16)
            folder.mkdir(mode=0o700)
            lock = _lock_of(folder)
            try:
                lock.acquire(blocking=False)
            except (Timeout, FileNotFoundError):
                continue
            if (folder / _LOCK).exists():
                return folder, lock
            lock.release()
        raise OSError("no folder for unfinished files can be made")


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / _LOCK, thread_local=False)


def _remove_if_abandoned(folder: Path) -> None:
    """Deletes a process's folder unless its lock is held.

    Raises:
        OSError: it cannot be deleted, or holds what no process puts there.
    """
    if not (folder / _LOCK).exists():
        folder.rmdir()  # its process ended before it had locked it
        return
    lock = _lock_of(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return
    try:
        _remove(folder)
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    """The lock's file goes last: a folder without one, and with files, would never be deleted."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    folder.rmdir()
