"""Jobs as rows: every statement there is. Used on one thread, the store's.

A row is made before its caller gets an answer, and ends once: `finish` writes an end only where there is none.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.store import rows
from chromarpc_server.jobs.store.ballast import Ballast
from chromarpc_server.jobs.store.images import Images
from chromarpc_server.jobs.store.kept_time import KeptTime
from chromarpc_server.jobs.store.lost_rows import lost_rows, page_by_row
from chromarpc_server.jobs.store.named_images import NamedImages
from chromarpc_server.jobs.store.rows import FAILED, AnyRow, EndRow, LostRow, NewRow, StoreSize
from chromarpc_server.jobs.store.sqlite_file import (
    empty_log,
    explained,
    is_damage,
    is_out_of_room,
    log_bytes,
    open_with_ballast,
    transaction,
)
from chromarpc_server.jobs.store.time_facts import keep_time, latest_s

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Database:
    """One SQLite file, or one in memory, and the images that its rows name."""

    def __init__(
        self,
        path: Path | None,
        images: Images,
        retention: JobRetention,
        *,
        make_time: Callable[[float | None], KeptTime] = KeptTime,
    ) -> None:
        """Opens the file, or makes it, brings its schema up to date, and sets aside images that no job names.

        Args:
            path: of the file; None keeps all in memory.
            images: the images.
            retention: how much is kept of jobs that ended.
            make_time: the store's time, from the latest one that the store knows of, in seconds.

        Raises:
            StoreUnusable: the file is damaged, in use, or from a newer version. It is left as it is.
        """
        self._path = path
        self._retention = retention
        self._size = StoreSize(0, 0)
        self._ballast = None if path is None else Ballast(path.parent)
        self._connection = open_with_ballast(path, self._ballast)
        try:
            with explained(path):
                self._images = NamedImages(self._connection, images)
                self.time = make_time(latest_s(self._connection))
                self._size = self._measure()
                self._start()
        except BaseException:
            self._connection.close()
            raise

    @property
    def size(self) -> StoreSize:
        """How much is kept."""
        return self._size

    @property
    def log_bytes(self) -> int:
        """Size of SQLite's write-ahead log."""
        return log_bytes(self._path)

    def insert(self, row: NewRow) -> None:
        """A job was admitted."""
        if row.request_id is not None:
            # A job that has expired may still have the id. Others that cannot be forgotten now are not in the way.
            with suppress(sqlite3.Error, OSError):
                self.sweep()
        values: dict[str, Any] = {**asdict(row), "format": rows.FORMAT, "admitted_kept_us": self.time.now_us()}
        values["plan_check"] = rows.plan_check(values)
        self._run(
            f"INSERT INTO jobs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608 - names of ours
            list(values.values()),
        )

    def begin(self, job_id: str, started_us: int) -> None:
        """It is about to run."""
        statement = "UPDATE jobs SET attempts = attempts + 1, started_us = ? WHERE id = ?"
        self._with_ballast(lambda: self._run(statement, (started_us, job_id)))

    def unbegin(self, job_id: str) -> None:
        """It was stopped in good order before its end, which counts as no attempt."""
        statement = "UPDATE jobs SET attempts = attempts - 1 WHERE id = ?"
        self._with_ballast(lambda: self._run(statement, (job_id,)))

    def note_adapters(self, job_id: str, adapters: str) -> None:
        """More is known of its adapters."""
        self._run("UPDATE jobs SET adapters = ? WHERE id = ?", (adapters, job_id))

    def note_detached(self, job_id: str) -> None:
        """It goes on without its callers."""
        self._run("UPDATE jobs SET detached = 1 WHERE id = ?", (job_id,))

    def note_cancelled(self, job_id: str) -> None:
        """Its cancellation will be acknowledged: no other process may go on with it."""
        statement = "UPDATE jobs SET cancelled = 1 WHERE id = ?"
        self._with_ballast(lambda: self._run(statement, (job_id,)))

    def release_request_id(self, job_id: str) -> None:
        """Lets another job have the request id of one that ended."""
        self._run("UPDATE jobs SET request_id = NULL WHERE id = ? AND ended_us IS NOT NULL", (job_id,))

    def put_image(self, sha256: str, data: bytes, owner: str) -> None:
        """Keeps an image of a job that has not ended.

        Raises:
            OSError: there is no room.
        """
        self._images.put(sha256, data, owner)

    def has_image(self, sha256: str) -> bool:
        """Whether it was put for a job that has not ended."""
        return self._images.is_pending(sha256)

    def names_image(self, job_id: str, sha256: str) -> bool:
        """Whether a job that ended is there, and has the image."""
        return self._images.is_named_by(job_id, sha256)

    def finish(self, row: EndRow) -> bool:
        """Writes a job's end. Returns False, and changes nothing, where it has one already or is gone."""
        is_first = self._with_ballast(lambda: self._end(row))
        if is_first:
            size = row.image_bytes + len(row.events)
            self._size = StoreSize(self._size.jobs + 1, self._size.bytes + size)
        self._images.let_go(row.images)
        try:
            if not is_first:
                self._images.drop_unnamed(row.images)
            self.sweep()
        except (sqlite3.Error, OSError) as error:
            # The end is written: it stands although there is no room to forget others.
            log.warning("store.not_swept", extra={"error": str(error)})
        return is_first

    def _end(self, row: EndRow) -> bool:
        values: dict[str, Any] = {
            "id": row.id,
            "ended_us": row.ended_us,
            "ended_kept_us": self.time.now_us(),
            "state": row.state,
            "done_steps": row.done_steps,
            "ending": row.ending,
            "headers": row.headers,
        }
        values |= {
            "end_check": rows.end_check(values),
            "events": row.events,
            "events_check": rows.events_check(row.events),
            "bytes": row.image_bytes + len(row.events),
            "format": rows.FORMAT,
        }
        with transaction(self._connection):
            cursor = self._connection.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in values)} "  # noqa: S608 - names of ours
                "WHERE id = ? AND ended_us IS NULL",
                [*values.values(), row.id],
            )
            is_first = cursor.rowcount == 1
            if is_first:
                self._images.name(row.id, row.images)
        return is_first

    def take_over(self) -> tuple[list[sqlite3.Row], bool]:
        """The jobs that did not end, in the order of admission, and whether this process is counted for each:
        where there is no room for that it is not, and they may not run before `count_start`.
        """
        query = "SELECT * FROM jobs WHERE ended_us IS NULL ORDER BY number"
        is_counted = True
        try:
            self.count_start()
        except sqlite3.Error as error:
            if not is_out_of_room(error):
                raise
            is_counted = False
        return self._connection.execute(query).fetchall(), is_counted

    def count_start(self) -> None:
        """Counts this process for each job that did not end."""
        statement = "UPDATE jobs SET starts = starts + 1 WHERE ended_us IS NULL"
        self._with_ballast(lambda: self._run(statement, ()))

    def ended(self, owner: str, job_id: str) -> AnyRow | None:
        """A job that ended."""
        try:
            return self._kept(f"{_ENDED} AND owner = ? AND id = ?", (owner, job_id))
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            return next((row for row in lost_rows(self._connection, owner) if row.id == job_id), None)

    def ended_by_request(self, owner: str, request_id: str) -> sqlite3.Row | None:
        """The one that was made under a request id."""
        return self._kept(f"{_ENDED} AND owner = ? AND request_id = ?", (owner, request_id))

    def events(self, job_id: str) -> tuple[bytes, str | None] | None:
        """Those of a job that ended, and their checksum."""
        row = self._one("SELECT events, events_check FROM jobs WHERE id = ? AND ended_us IS NOT NULL", (job_id,))
        return None if row is None else (row["events"], row["events_check"])

    def page(
        self,
        owner: str,
        limit: int,
        *,
        before: tuple[int, str] | None,
        since_us: int | None,
        states: Sequence[str] | None,
    ) -> list[AnyRow]:
        """Jobs that ended, newest admission first.

        Args:
            owner: whose.
            limit: at most so many.
            before: only those admitted before this time and id.
            since_us: only those admitted at or after this time.
            states: only those that ended so; one that cannot be read counts as failed.
        """
        narrowed, values = "", list[Any]()
        if before is not None:
            narrowed += " AND (created_us, id) < (?, ?)"
            values += list(before)
        if since_us is not None:
            narrowed += " AND created_us >= ?"
            values.append(since_us)
        query, parts = f"{_ENDED} AND owner = ?{narrowed}", [owner, *values]
        if states is not None:
            query += f" AND state IN ({', '.join('?' * len(states))})"
            parts += states
        try:
            found_rows = self._connection.execute(query + " ORDER BY created_us DESC, id DESC", parts)
            return list(islice(filter(self._is_kept, found_rows), limit))
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
        find = f"{_ENDED} AND id = ?"
        found = page_by_row(self._connection, lambda job_id: self._kept(find, (job_id,)), owner, narrowed, values)
        return list(islice((row for row in found if states is None or _state(row) in states), limit))

    def delete(self, job_id: str, *, although_not_ended: bool = False) -> bool:
        """Forgets a job that ended; `although_not_ended`: or one that cannot be run, as nothing can read it.
        Returns whether there was one.
        """
        is_gone = self._forget([job_id], although_not_ended=although_not_ended) == 1
        empty_log(self._connection)
        return is_gone

    def sweep(self) -> None:
        """Forgets what is too old, and then the oldest of what is too much, but never the newest."""
        has_forgotten = False
        while (found := self._surplus() or self._outdated()) and self._forget(found):
            has_forgotten = True
        if has_forgotten:
            empty_log(self._connection)

    def _surplus(self) -> list[str]:
        """The oldest job, where there are too many or too large ones."""
        keep = self._retention
        is_too_much = self._size.bytes > keep.keep_bytes and self._size.jobs > 1
        if self._size.jobs <= keep.keep_jobs and not is_too_much:
            return []
        query = "SELECT id FROM jobs WHERE ended_us IS NOT NULL ORDER BY ended_kept_us LIMIT 1"
        return [row["id"] for row in self._connection.execute(query)]

    def _outdated(self) -> list[str]:
        """Some jobs that are too old. One whose row is damaged may be younger than it says, and stays."""
        query = f"SELECT {_END_COLUMNS} FROM jobs WHERE ended_kept_us <= ? ORDER BY ended_kept_us"  # noqa: S608
        intact = (
            row["id"] for row in self._connection.execute(query, (self._oldest_us(),)) if rows.is_end_intact(row)
        )
        return list(islice(intact, 100))

    def tend(self) -> None:
        """What is due every half minute: looks at the clock, sweeps, empties the log, and holds the ballast."""
        self.time.advance()
        try:
            self.sweep()
        finally:  # one job that cannot be forgotten keeps nothing else from being done
            keep_time(self._connection, self.time.now_us())
            empty_log(self._connection)
            if self._ballast is not None:
                self._ballast.make()

    def close(self) -> None:
        """Writes everything into the one file."""
        with suppress(sqlite3.Error):
            keep_time(self._connection, self.time.now_us())
        empty_log(self._connection)
        self._connection.close()

    def _start(self) -> None:
        try:
            # Whether it can be written is found out now rather than by the first job.
            self._with_ballast(lambda: self._run("UPDATE facts SET value = value WHERE name = 'written_by'", ()))
            self._images.tidy_up()
            self.sweep()
            if self._ballast is not None:
                self._ballast.make()
        except (sqlite3.Error, OSError) as error:
            if not is_out_of_room(error):
                raise
            log.warning("store.full", extra={"doing": "start"})

    def _measure(self) -> StoreSize:
        query = "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM jobs WHERE ended_us IS NOT NULL"
        size = StoreSize(*self._connection.execute(query).fetchone())
        if size.bytes <= self._retention.keep_bytes:
            return size
        # Before jobs are forgotten for their size: it is under no checksum, and a flipped bit makes it terabytes.
        query = (
            f"SELECT {_END_COLUMNS}, bytes, LENGTH(events) AS events_bytes FROM jobs WHERE ended_us IS NOT NULL"  # noqa: S608
        )
        sizes = {row["id"]: (row["bytes"], rows.stored_bytes(row)) for row in self._connection.execute(query)}
        for job_id, (noted, real) in sizes.items():
            if noted != real:
                self._run("UPDATE jobs SET bytes = ? WHERE id = ?", (real, job_id))
        return StoreSize(len(sizes), sum(real for _, real in sizes.values()))

    def _kept(self, query: str, values: Sequence[Any]) -> sqlite3.Row | None:
        row = self._one(query, values)
        return row if row is not None and self._is_kept(row) else None

    def _is_kept(self, row: sqlite3.Row) -> bool:
        """Whether a job that ended is not too old; one whose row is damaged may be younger than it says."""
        ended_us = row["ended_kept_us"]
        return not isinstance(ended_us, int) or ended_us > self._oldest_us() or not rows.is_end_intact(row)

    def _oldest_us(self) -> int:
        return round((self.time.now_s() - self._retention.keep_s) * 1e6)

    def _forget(self, job_ids: Sequence[str], *, although_not_ended: bool = False) -> int:
        """Deletes rows that ended, whatever they hold, and then the images that are nobody's any more."""
        try:
            return self._with_ballast(lambda: self._delete(job_ids, although_not_ended=although_not_ended))
        except sqlite3.Error as error:
            if not is_out_of_room(error):
                raise
        # There is room in what is to be deleted: first the images, and then their rows, one by one.
        self._images.drop_only_of(job_ids)
        return sum(self._delete([job_id], although_not_ended=although_not_ended) for job_id in job_ids)

    def _delete(self, job_ids: Sequence[str], *, although_not_ended: bool) -> int:
        marks = ", ".join("?" * len(job_ids))
        which = f"id IN ({marks})" + ("" if although_not_ended else " AND ended_us IS NOT NULL")
        with transaction(self._connection):
            images = self._images.of(job_ids)
            self._images.intend_to_drop(images)
            gone = self._connection.execute(
                f"DELETE FROM jobs WHERE {which} RETURNING bytes, ended_us",  # noqa: S608 - ours
                list(job_ids),
            ).fetchall()
        ended = [row["bytes"] for row in gone if row["ended_us"] is not None]
        self._size = StoreSize(self._size.jobs - len(ended), self._size.bytes - sum(ended))
        try:
            self._images.drop_unnamed(images)
        except sqlite3.Error as error:
            if not is_out_of_room(error):  # they are gone; a start forgets that they were to go
                raise
        return len(gone)

    def _with_ballast(self, work: Callable[[], _T]) -> _T:
        """Does what has to succeed on a full disk too, if need be in the room that was held for it."""
        try:
            return work()
        except sqlite3.Error as error:
            if self._ballast is None or not is_out_of_room(error) or not self._ballast.give_up():
                raise
        log.warning("store.full", extra={"doing": "give up the ballast"})
        empty_log(self._connection)
        return work()

    def _one(self, query: str, values: Sequence[Any]) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._connection.execute(query, values).fetchone()
        return found

    def _run(self, statement: str, values: Sequence[Any]) -> None:
        self._connection.execute(statement, values)


def _state(row: AnyRow) -> str:
    return FAILED if isinstance(row, LostRow) else str(row["state"])


_END_COLUMNS = "id, ended_us, ended_kept_us, state, done_steps, ending, headers, end_check"
_ENDED = (
    "SELECT id, owner, request_id, fingerprint, created_us, plan, has_prompts, needs_token, adapters, attempts, "
    "started_us, ended_us, state, done_steps, ending, headers, format, plan_check, end_check, detached, "
    "admitted_kept_us, ended_kept_us "
    "FROM jobs WHERE ended_us IS NOT NULL"
)
