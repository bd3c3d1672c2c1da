"""Room on the data folder's disk, and the reserve that is kept for what was admitted already."""

from __future__ import annotations

import shutil
from pathlib import Path

from chromarpc_server.domain.errors import DiskFull

RETRY_AFTER_S = 30.0
"""Retention may free something every half minute."""


class DiskRoom:
    """Asks the file system each time; any thread may."""

    def __init__(self, folder: Path, reserve_bytes: int) -> None:
        """Touches nothing.

        Args:
            folder: any on the disk; may not exist yet.
            reserve_bytes: what has to stay free, so that jobs that were admitted can end well; 0 keeps nothing.
        """
        self._folder = folder
        self._reserve_bytes = reserve_bytes

    @property
    def reserve_bytes(self) -> int:
        """What has to stay free."""
        return self._reserve_bytes

    def free_bytes(self) -> int:
        """What this user may still write.

        Raises:
            OSError: the file system does not say.
        """
        folder = self._folder.absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def require(self, needed_bytes: int, what: str) -> None:
        """Checks that the reserve is still there once so much more is written.

        Args:
            needed_bytes: at most what will be written.
            what: is to be written, for the message: `another job`.

        Raises:
            DiskFull: it would not be.
        """
        if not self._reserve_bytes:
            return
        try:
            free = self.free_bytes()
        except OSError:
            return  # whatever is wrong there, the write itself finds out
        if free - needed_bytes < self._reserve_bytes:
            raise DiskFull(
                f"the server's disk has {free >> 20} MiB free, too little for {what} beside the "
                f"{self._reserve_bytes >> 20} MiB that it keeps in reserve: delete jobs or uploads that you need "
                "no longer, or ask its operator for room",
                retry_after_s=RETRY_AFTER_S,
                metadata={"free_bytes": str(free), "reserve_bytes": str(self._reserve_bytes)},
            )
