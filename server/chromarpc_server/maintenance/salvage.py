"""What can be read of a damaged database, in a new one.

SQLite reads a damaged file up to the first page that makes no sense. Here every row is fetched by itself, its
number found in the table or in any index. A lost first page, which says where everything else lies, is taken from
an empty database of the same schema: the same statements put the same tables at the same pages.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.maintenance import databases

_PAGE_BYTES = 4096
"""SQLite's default, and so of every store."""
_HEADER_BYTES = 100
_PAGE_COUNT = slice(28, 32)
"""Of the header: how many pages there are, big-endian."""
_VERSIONS = range(len(MIGRATIONS), 0, -1)
"""Of the schema, newest first."""


@dataclass(frozen=True)
class Salvaged:
    """What was saved."""

    jobs: int
    unreadable: int
    """Jobs that are known to have been there and cannot be read."""


def salvage(source: Path, target: Path) -> Salvaged:
    """Copies every readable job into a new database; the damaged one is only read.

    Args:
        source: the damaged database, with its WAL beside it.
        target: must not exist.

    Raises:
        OSError, sqlite3.OperationalError: there is no room.
    """
    with _opened(source, target.with_name(f"{target.name}.source")) as damaged:
        version = 0 if damaged is None else _schema_of(damaged)
        target.touch(mode=0o600)
        with closing(sqlite3.connect(target, isolation_level=None)) as saved:
            saved.execute("PRAGMA foreign_keys = ON")
            make_schema(saved, version or len(MIGRATIONS))
            if damaged is None or not version:
                return Salvaged(0, 0)
            saved.execute("BEGIN")
            found = _copy_jobs(damaged, saved)
            saved.execute("COMMIT")
            return found


def make_schema(database: sqlite3.Connection, version: int) -> None:
    """Makes the tables of an empty database, as a server does."""
    for number in range(version):
        for statement in MIGRATIONS[number].split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {number + 1}")


@contextmanager
def _opened(source: Path, scratch: Path) -> Iterator[sqlite3.Connection | None]:
    """A copy of the damaged database, as far as it can be opened; None where nothing helps.

    Args:
        source: is left as it is.
        scratch: folder for the copy; is removed.
    """
    scratch.mkdir(mode=0o700)
    copy = scratch / source.name
    attempts = [(0, False)] + [(version, whole) for whole in (False, True) for version in _VERSIONS]
    try:
        for version, whole_page in attempts:
            for name in (source.name, f"{source.name}-wal"):
                if source.with_name(name).exists():
                    shutil.copyfile(source.with_name(name), scratch / name)
            if version:
                _replace_first_page(copy, version, whole_page=whole_page)
            if _has_jobs(copy):
                with closing(_connected(copy)) as database:
                    yield database
                return
        yield None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    database.row_factory = sqlite3.Row
    # Else SQLite refuses a file that is shorter than its header says.
    database.execute("PRAGMA writable_schema = ON")
    return database


def _has_jobs(path: Path) -> bool:
    with closing(_connected(path)) as database:
        try:
            return _schema_of(database) > 0 and bool(databases.numbers(database))
        except sqlite3.DatabaseError:
            return False


def _schema_of(database: sqlite3.Connection) -> int:
    """The version whose columns the jobs have; 0 where it is none that is known."""
    columns = {column["name"] for column in database.execute("PRAGMA table_info(jobs)")}
    return next((version for version in _VERSIONS if columns == _columns(version)), 0)


def _columns(version: int) -> set[str]:
    with closing(sqlite3.connect(":memory:")) as database:
        make_schema(database, version)
        return {column[1] for column in database.execute("PRAGMA table_info(jobs)")}


def _replace_first_page(path: Path, version: int, *, whole_page: bool) -> None:
    """Writes the first page of an empty database over a damaged one: its header, or all of it."""
    fresh = path.with_name("fresh")
    fresh.unlink(missing_ok=True)
    with closing(sqlite3.connect(fresh, isolation_level=None)) as database:
        database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        make_schema(database, version)
    page = bytearray(fresh.read_bytes()[:_PAGE_BYTES])
    page[_PAGE_COUNT] = (path.stat().st_size // _PAGE_BYTES).to_bytes(4, "big")
    with path.open("r+b") as file:
        file.write(page if whole_page else page[:_HEADER_BYTES])


def _copy_jobs(damaged: sqlite3.Connection, saved: sqlite3.Connection) -> Salvaged:
    jobs = unreadable = 0
    for number in databases.numbers(damaged):
        found, why = databases.judged(damaged, number)
        if found is None or why is not None:
            unreadable += 1
            continue
        names = found.keys()
        marks = ", ".join("?" * len(names))
        try:
            saved.execute(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})", tuple(found))  # noqa: S608
        except sqlite3.IntegrityError:  # a second one with its id
            unreadable += 1
            continue
        jobs += 1
        saved.executemany(
            "INSERT OR IGNORE INTO images VALUES (?, ?)",
            [(found["id"], sha256) for sha256 in databases.images_of(found)],
        )
    return Salvaged(jobs, unreadable)
