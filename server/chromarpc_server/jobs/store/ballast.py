"""Room that is held on the disk so that something can still be deleted when there is none left.

A deletion writes before it frees: SQLite logs the pages that it changes. On a full disk the ballast's file is
given up first, and made again once there is room.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

FILE: Final = "ballast"
SIZE_BYTES: Final = 1024 * 1024
"""More than the log of a usual job's deletion; a larger job's images are deleted before its row where need be."""


class Ballast:
    """One file of random bytes, which no file system stores in less than they are."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing."""
        self._path = folder / FILE

    def make(self) -> bool:
        """Makes the file where it is not there whole. Returns whether it is now."""
        try:
            if self._path.stat().st_size >= SIZE_BYTES:
                return True
        except OSError:
            pass
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SIZE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.give_up()
            return False
        return True

    def give_up(self) -> bool:
        """Frees its room. Returns whether there was any."""
        try:
            was_there = self._path.stat().st_size > 0
        except OSError:
            return False
        with suppress(OSError):
            self._path.unlink()
            return was_there
        return False
