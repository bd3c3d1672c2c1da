"""Jobs as rows: every statement there is. Used on one thread, the store's.

A row is made before its caller gets an answer, and ends once: `finish` writes an end only where there is none.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.store.images import Images
from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.jobs.store.unusable import StoreUnusable

log = logging.getLogger(__name__)

FILE = "jobs.sqlite3"


@dataclass(frozen=True)
class NewRow:
    """A job at its admission."""

    id: str
    owner: str
    request_id: str | None
    fingerprint: str
    created_us: int
    plan: str
    has_prompts: bool
    needs_token: bool
    adapters: str


@dataclass(frozen=True)
class EndRow:
    """What becomes of it."""

    id: str
    ended_us: int
    state: str
    done_steps: int
    ending: str
    headers: str
    events: bytes
    images: Sequence[str]
    """Hashes of its images, each `put` before."""
    image_bytes: int


@dataclass(frozen=True)
class StoreSize:
    """How much is kept of jobs that ended."""

    jobs: int
    bytes: int


class Database:
    """One SQLite file, or one in memory, and the images that its rows name."""

    def __init__(
        self,
        path: Path | None,
        images: Images,
        retention: JobRetention,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the file, or makes it, brings its schema up to date and removes images that no job names.

        Args:
            path: of the file; None keeps all in memory.
            images: the images.
            retention: how much is kept of jobs that ended.
            clock: seconds since the epoch.

        Raises:
            StoreUnusable: the file is damaged, in use, or from a newer version. It is left as it is.
        """
        self._path = path
        self._images = images
        self._retention = retention
        self._clock = clock
        self._pending: Counter[str] = Counter()
        """Images of jobs that have not ended."""
        self._size = StoreSize(0, 0)
        with _explained(path):
            self._connection = sqlite3.connect(
                ":memory:" if path is None else path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up()
            except BaseException:
                self._connection.close()
                raise

    @property
    def size(self) -> StoreSize:
        """How much is kept."""
        return self._size

    def insert(self, row: NewRow) -> None:
        """A job was admitted."""
        if row.request_id is not None:
            # A job that has expired may still have the id.
            self.sweep()
        columns = list(NewRow.__dataclass_fields__)
        self._run(
            f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",  # noqa: S608 - names of ours
            [getattr(row, column) for column in columns],
        )

    def begin(self, job_id: str, started_us: int) -> None:
        """It is about to run."""
        self._run("UPDATE jobs SET attempts = attempts + 1, started_us = ? WHERE id = ?", (started_us, job_id))

    def unbegin(self, job_id: str) -> None:
        """It was stopped in good order before its end, which counts as no attempt."""
        self._run("UPDATE jobs SET attempts = attempts - 1 WHERE id = ?", (job_id,))

    def note_adapters(self, job_id: str, adapters: str) -> None:
        """More is known of its adapters."""
        self._run("UPDATE jobs SET adapters = ? WHERE id = ?", (adapters, job_id))

    def note_detached(self, job_id: str) -> None:
        """It goes on without its callers."""
        self._run("UPDATE jobs SET plan = json_set(plan, '$.detached', json('true')) WHERE id = ?", (job_id,))

    def note_cancelled(self, job_id: str) -> None:
        """Its cancellation will be acknowledged: no other process may go on with it."""
        self._run("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job_id,))

    def release_request_id(self, job_id: str) -> None:
        """Lets another job have the request id of one that ended."""
        self._run("UPDATE jobs SET request_id = NULL WHERE id = ? AND ended_us IS NOT NULL", (job_id,))

    def put_image(self, sha256: str, data: bytes) -> None:
        """Keeps an image of a job that has not ended.

        Raises:
            OSError: there is no room.
        """
        self._images.put(sha256, data)
        self._pending[sha256] += 1

    def has_image(self, sha256: str) -> bool:
        """Whether it was put for a job that has not ended."""
        return self._pending[sha256] > 0

    def finish(self, row: EndRow) -> bool:
        """Writes a job's end. Returns False, and changes nothing, where it has one already or is gone."""
        size = row.image_bytes + len(row.events)
        with self._transaction():
            cursor = self._connection.execute(
                "UPDATE jobs SET ended_us = ?, state = ?, done_steps = ?, ending = ?, headers = ?, events = ?, "
                "bytes = ? WHERE id = ? AND ended_us IS NULL",
                (
                    row.ended_us,
                    row.state,
                    row.done_steps,
                    row.ending,
                    row.headers,
                    row.events,
                    size,
                    row.id,
                ),
            )
            is_first = cursor.rowcount == 1
            if is_first:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO images VALUES (?, ?)", [(row.id, sha256) for sha256 in row.images]
                )
        if is_first:
            self._size = StoreSize(self._size.jobs + 1, self._size.bytes + size)
        try:
            for sha256 in row.images:
                self._let_go(sha256)
            self.sweep()
        except sqlite3.Error as error:
            # The end is written: it stands although there is no room to forget others.
            log.warning("store.not_swept", extra={"error": str(error)})
        return is_first

    def take_over(self) -> list[sqlite3.Row]:
        """The jobs that did not end, in the order of admission; this process is counted for each."""
        with self._transaction():
            self._connection.execute("UPDATE jobs SET starts = starts + 1 WHERE ended_us IS NULL")
            return self._connection.execute("SELECT * FROM jobs WHERE ended_us IS NULL ORDER BY number").fetchall()

    def ended(self, owner: str, job_id: str) -> sqlite3.Row | None:
        """A job that ended."""
        return self._one(f"{_ENDED} AND owner = ? AND id = ?", (self._oldest_us(), owner, job_id))

    def ended_by_request(self, owner: str, request_id: str) -> sqlite3.Row | None:
        """The one that was made under a request id."""
        return self._one(f"{_ENDED} AND owner = ? AND request_id = ?", (self._oldest_us(), owner, request_id))

    def events(self, job_id: str) -> bytes | None:
        """Those of a job that ended."""
        row = self._one("SELECT events FROM jobs WHERE id = ? AND ended_us IS NOT NULL", (job_id,))
        return None if row is None else row["events"]

    def page(
        self,
        owner: str,
        limit: int,
        *,
        before: tuple[int, str] | None,
        since_us: int | None,
        states: Sequence[str] | None,
    ) -> list[sqlite3.Row]:
        """Jobs that ended, newest admission first.

        Args:
            owner: whose.
            limit: at most so many.
            before: only those admitted before this time and id.
            since_us: only those admitted at or after this time.
            states: only those that ended so.
        """
        query, values = f"{_ENDED} AND owner = ?", [self._oldest_us(), owner]
        parts: list[Any] = values
        if before is not None:
            query += " AND (created_us, id) < (?, ?)"
            parts += before
        if since_us is not None:
            query += " AND created_us >= ?"
            parts.append(since_us)
        if states is not None:
            query += f" AND state IN ({', '.join('?' * len(states))})"
            parts += states
        query += " ORDER BY created_us DESC, id DESC LIMIT ?"
        return self._connection.execute(query, [*parts, limit]).fetchall()

    def delete(self, job_id: str) -> bool:
        """Forgets a job that ended. Returns whether there was one."""
        return self._forget([job_id]) == 1

    def sweep(self) -> None:
        """Forgets what is too old, and then the oldest of what is too much, but never the newest."""
        keep = self._retention
        while True:
            excess = self._size.jobs > keep.keep_jobs or (
                self._size.bytes > keep.keep_bytes and self._size.jobs > 1
            )
            condition = "ended_us IS NOT NULL" if excess else f"ended_us <= {self._oldest_us()}"
            rows = self._connection.execute(
                f"SELECT id FROM jobs WHERE {condition} ORDER BY ended_us LIMIT ?",  # noqa: S608 - ours
                (1 if excess else 100,),
            ).fetchall()
            if not rows:
                return
            self._forget([row["id"] for row in rows])

    def close(self) -> None:
        """Writes everything into the one file."""
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()

    def _set_up(self) -> None:
        self._connection.row_factory = sqlite3.Row
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreUnusable(
                f"the job store {self._path} was written by a newer chromarpc (schema {version}, this one knows "
                f"{len(MIGRATIONS)}): run that version, or give this one another --data-dir"
            )
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA foreign_keys = ON")
        # What a deleted job said is overwritten, rather than left in free pages; only some builds do so unasked.
        execute("PRAGMA secure_delete = ON")
        if version:
            damage = execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)
        for number in range(version, len(MIGRATIONS)):
            with self._transaction():
                for statement in MIGRATIONS[number].split(";\n"):
                    execute(statement)
                execute(f"PRAGMA user_version = {number + 1}")
        # A lock for good from here on; reading alone would take none.
        execute("BEGIN IMMEDIATE")
        execute("COMMIT")
        self._size = self._measure()
        named = {row[0] for row in execute("SELECT DISTINCT sha256 FROM images")}
        for sha256 in self._images.hashes():
            if sha256 not in named:
                self._images.drop(sha256)
        self.sweep()

    def _measure(self) -> StoreSize:
        query = "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM jobs WHERE ended_us IS NOT NULL"
        return StoreSize(*self._connection.execute(query).fetchone())

    def _oldest_us(self) -> int:
        return round((self._clock() - self._retention.keep_s) * 1e6)

    def _forget(self, job_ids: Sequence[str]) -> int:
        marks = ", ".join("?" * len(job_ids))
        with self._transaction():
            images = self._connection.execute(
                f"SELECT DISTINCT sha256 FROM images WHERE job IN ({marks})",  # noqa: S608 - ours
                job_ids,
            ).fetchall()
            gone = self._connection.execute(
                f"DELETE FROM jobs WHERE id IN ({marks}) AND ended_us IS NOT NULL RETURNING bytes",  # noqa: S608
                job_ids,
            ).fetchall()
        self._size = StoreSize(self._size.jobs - len(gone), self._size.bytes - sum(row["bytes"] for row in gone))
        for row in images:
            self._drop_unnamed(row["sha256"])
        return len(gone)

    def _let_go(self, sha256: str) -> None:
        self._pending[sha256] -= 1
        if self._pending[sha256] <= 0:
            del self._pending[sha256]
        self._drop_unnamed(sha256)

    def _drop_unnamed(self, sha256: str) -> None:
        query = "SELECT 1 FROM images WHERE sha256 = ? LIMIT 1"
        if self._pending[sha256] <= 0 and self._connection.execute(query, (sha256,)).fetchone() is None:
            del self._pending[sha256]
            self._images.drop(sha256)

    def _one(self, query: str, values: Sequence[Any]) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._connection.execute(query, values).fetchone()
        return found

    def _run(self, statement: str, values: Sequence[Any]) -> None:
        self._connection.execute(statement, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise


_ENDED = (
    "SELECT id, owner, request_id, fingerprint, created_us, plan, attempts, started_us, ended_us, state, "
    "done_steps, ending, headers FROM jobs WHERE ended_us > ?"
)


@contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    """Why a file cannot be opened, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreUnusable(
                f"the job store {path} is in use by another process: stop that one, or give this server another "
                "--data-dir or --store memory"
            ) from None
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            why = " ".join(str(error).split())
            raise StoreUnusable(
                f"the job store {path} is damaged ({why}) and was left as it is: restore it from a backup, or "
                f"save what can be read with `sqlite3 {path} .recover | sqlite3 new.sqlite3` and put that in its "
                "place, or move it away to begin with an empty one; images lie beside it in images/ under "
                "their SHA-256"
            ) from None
        raise StoreUnusable(
            f"the job store {path} cannot be used ({error}): see that the folder can be written and the disk has "
            "room, or give this server another --data-dir or --store memory"
        ) from None
