"""Which process has the store: a lock on a file beside the database, free again however the process ends.

The database itself is not locked for long, so that a tool can read it beside a running server.
"""

from __future__ import annotations

from pathlib import Path

import filelock

from chromarpc_server.jobs.store.unusable import StoreInUse, StoreUnusable

LOCK_FILE = "lock"


class StoreLock:
    """The lock of the store in a folder, held by a server, or by a tool that changes it. For any thread."""

    def __init__(self, folder: Path) -> None:
        """Touches no file.

        Args:
            folder: of the store, `jobs` below the data folder; must exist when the lock is acquired.
        """
        self._folder = folder
        # Not for each thread its own: the store's thread acquires it, and another may release it.
        self._lock = filelock.FileLock(folder / LOCK_FILE, timeout=0, mode=0o600, thread_local=False)

    def acquire(self) -> None:
        """Takes the lock, or does nothing where this object has it.

        Raises:
            StoreInUse: another process, or another object of this one, has it.
            StoreUnusable: the lock's file cannot be made.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise StoreInUse(
                f"the job store {self._folder} is in use by another process: stop that one, or use another "
                "--data-dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            # NotImplementedError: older versions of filelock, where the file system has no locks.
            why = getattr(error, "strerror", None) or error
            raise StoreUnusable(
                f"the job store {self._folder} cannot be locked ({why}): see that the folder can be written, or "
                "use another --data-dir"
            ) from None

    def release(self) -> None:
        """Gives it back, or does nothing where this object does not have it; the file stays."""
        self._lock.release()
