"""Which images jobs name, and so which files may go: those that are meant to, and no others.

An image is written before its job ends and removed after its job is deleted. For the time between, the database
holds an intent: "this file may lie here although no job names it". A start removes what intents name. Any other
file without a job, as beside a database that was lost and made anew, is moved aside and kept.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

from chromarpc_server.jobs.store.images import Images

log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Values in one statement."""


class NamedImages:
    """Images beside the rows of one database. Used on one thread, the store's."""

    def __init__(self, connection: sqlite3.Connection, images: Images) -> None:
        """Begins with nothing; see `tidy_up`."""
        self._connection = connection
        self._images = images
        self._pending: Counter[str] = Counter()
        """Images of jobs that have not ended."""

    def tidy_up(self) -> None:
        """After an earlier process: removes what was meant to go, and sets aside what no job names.

        Raises:
            OSError, sqlite3.Error: there is no room, or the disk fails.
        """
        execute = self._connection.execute
        named = {row[0] for row in execute("SELECT DISTINCT sha256 FROM images")}
        intended = {row[0] for row in execute("SELECT sha256 FROM image_intents")}
        left = set(self._images.drop(sorted(intended - named)))
        unnamed = [sha256 for sha256 in self._images.hashes() if sha256 not in named and sha256 not in left]
        for sha256 in unnamed:
            self._images.set_aside(sha256)
        if unnamed:
            log.error(
                "store.images_unnamed",
                extra={
                    "count": len(unnamed),
                    "moved_to": "images/lost+found",
                    "do": "no job names these images: was the database lost, or replaced? see `store check`",
                },
            )
        put_back = sum(self._images.put_back(sha256) for sha256 in named) if self._images.lost()[0] else 0
        if put_back:
            log.warning("store.images_put_back", extra={"count": put_back})
        self._settle(intended - left)

    def put(self, sha256: str, data: bytes, owner: str) -> None:
        """Keeps an image of a job that has not ended.

        Raises:
            OSError, sqlite3.Error: there is no room, or the disk fails.
        """
        if not self._is_named(sha256):
            self._connection.execute("INSERT OR IGNORE INTO image_intents VALUES (?)", (sha256,))
        self._images.put(sha256, data, owner)
        self._pending[sha256] += 1

    def is_pending(self, sha256: str) -> bool:
        """Whether it was put for a job that has not ended."""
        return self._pending[sha256] > 0

    def name(self, job_id: str, hashes: Collection[str]) -> None:
        """A job ends with these images; within a transaction."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO images VALUES (?, ?)", [(job_id, sha256) for sha256 in hashes]
        )
        self._connection.executemany(
            "DELETE FROM image_intents WHERE sha256 = ?", [(sha256,) for sha256 in hashes]
        )

    def let_go(self, hashes: Iterable[str]) -> None:
        """Images of a job that has ended wait for its end no longer, whether it names them or not."""
        for sha256 in hashes:
            self._pending[sha256] -= 1
            if self._pending[sha256] <= 0:
                del self._pending[sha256]

    def of(self, job_ids: Collection[str]) -> list[str]:
        """The images that these jobs name."""
        marks = ", ".join("?" * len(job_ids))
        query = f"SELECT DISTINCT sha256 FROM images WHERE job IN ({marks})"  # noqa: S608 - ours
        return [row[0] for row in self._connection.execute(query, tuple(job_ids))]

    def intend_to_drop(self, hashes: Collection[str]) -> None:
        """Jobs with these images are about to be deleted; within that transaction."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO image_intents VALUES (?)", [(sha256,) for sha256 in hashes]
        )

    def drop_unnamed(self, hashes: Collection[str]) -> None:
        """Removes those that no job names any more, and that none is about to name."""
        gone = [sha256 for sha256 in hashes if not self.is_pending(sha256) and not self._is_named(sha256)]
        left = self._images.drop(gone)
        self._settle([sha256 for sha256 in hashes if not self.is_pending(sha256) and sha256 not in left])

    def _settle(self, hashes: Iterable[str]) -> None:
        """Nothing is left to do about these."""
        settled = list(hashes)
        for start in range(0, len(settled), _AT_ONCE):
            part = settled[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            self._connection.execute(f"DELETE FROM image_intents WHERE sha256 IN ({marks})", part)  # noqa: S608

    def drop_only_of(self, job_ids: Collection[str]) -> None:
        """Removes images that only these jobs name, before the jobs themselves: for want of room."""
        marks = ", ".join("?" * len(job_ids))
        query = f"SELECT 1 FROM images WHERE sha256 = ? AND job NOT IN ({marks}) LIMIT 1"  # noqa: S608 - ours
        self._images.drop(
            [
                sha256
                for sha256 in self.of(job_ids)
                if not self.is_pending(sha256)
                and self._connection.execute(query, (sha256, *job_ids)).fetchone() is None
            ]
        )

    def is_named_by(self, job_id: str, sha256: str) -> bool:
        """Whether a job names an image."""
        query = "SELECT 1 FROM images WHERE job = ? AND sha256 = ?"
        return self._connection.execute(query, (job_id, sha256)).fetchone() is not None

    def _is_named(self, sha256: str) -> bool:
        query = "SELECT 1 FROM images WHERE sha256 = ? LIMIT 1"
        return self._connection.execute(query, (sha256,)).fetchone() is not None
