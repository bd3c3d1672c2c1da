"""What lies where below the data folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.jobs.store.images import LOST_AND_FOUND
from chromarpc_server.jobs.store.lock import LOCK_FILE
from chromarpc_server.jobs.store.sqlite_file import FILE
from chromarpc_server.maintenance.report import CannotBeDone

HASH = re.compile(r"[0-9a-f]{64}")
STAGING = "restore.part"
"""Below the data folder: what a restore is to move to its place."""
REBUILT_SUFFIX = ".rebuilt"
"""Of a whole new database that is to take the place of the damaged one."""
REPLACED = "replaced-"
"""Begin of the names of stores in quarantine that others took the place of."""

_HALF_WRITTEN = (".part", ".note")
"""Ends of the names of files that are written before they get their name."""


@dataclass(frozen=True)
class DataFolder:
    """The folder of `--data-dir`, or one of a backup, which is laid out alike."""

    root: Path

    @property
    def jobs(self) -> Path:
        """Of the job store."""
        return self.root / "jobs"

    @property
    def database(self) -> Path:
        """Has the rows."""
        return self.jobs / FILE

    @property
    def images(self) -> Path:
        """Of all jobs, `ab/<hash>`."""
        return self.jobs / "images"

    @property
    def lost_and_found(self) -> Path:
        """Images that no row names."""
        return self.images / LOST_AND_FOUND

    @property
    def loras(self) -> Path:
        """Uploads that are whole."""
        return self.root / "loras"

    @property
    def downloads(self) -> Path:
        """Adapters that were fetched from URLs."""
        return self.root / "downloads"

    @property
    def uploads(self) -> Path:
        """Uploads that are not whole."""
        return self.root / "uploads"

    @property
    def quarantine(self) -> Path:
        """What tools moved away."""
        return self.root / "quarantine"

    def image(self, sha256: str) -> Path:
        """Where an image lies, or would lie."""
        return self.images / sha256[:2] / sha256

    def image_files(self) -> Iterator[Path]:
        """Every whole image that lies where it belongs."""
        for path in sorted(self.images.glob("??/*")):
            if HASH.fullmatch(path.name):
                yield path

    def half_written(self) -> list[Path]:
        """What writes left that were cut; beside a running server, some of them are under way."""
        patterns = {self.images: "??/*", self.loras: "*", self.downloads: "**/*", self.uploads: "**/*"}
        found = (path for area, pattern in patterns.items() for path in area.glob(pattern))
        return sorted(path for path in found if path.suffix in _HALF_WRITTEN)

    def name_of(self, path: Path) -> str:
        """A path as people are told of it: below the data folder."""
        return path.relative_to(self.root).as_posix()

    def has_store(self) -> bool:
        """Whether anything lies here that a server kept."""
        folders = (self.images, self.loras, self.downloads)
        return self.database.exists() or any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    def present(self) -> list[Path]:
        """All of the store that lies here, as files and folders to move away; the lock is none of it."""
        jobs = sorted(path for path in self.jobs.glob("*") if path.name != LOCK_FILE)
        found = [*jobs, self.loras, self.downloads, self.uploads]
        return [path for path in found if path.is_file() or (path.is_dir() and any(path.iterdir()))]

    def require_store(self) -> None:
        """Checks that there is something to look after.

        Raises:
            CannotBeDone: there is not.
        """
        if not self.has_store():
            raise CannotBeDone(f"{self.root} holds no store: say with --data-dir where the server keeps it")

    def require_ours(self) -> None:
        """Checks that what is written here can be read by the server afterwards.

        Raises:
            CannotBeDone: the folder is another user's.
        """
        if self.root.exists() and hasattr(os, "geteuid") and self.root.stat().st_uid != os.geteuid():
            raise CannotBeDone(
                f"{self.root} is the folder of the user with the id {self.root.stat().st_uid}: run this as that "
                "user, who could not read what another one writes"
            )
