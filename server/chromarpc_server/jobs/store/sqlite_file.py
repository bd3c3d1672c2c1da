"""One SQLite file: opened, brought up to date, and its errors in words."""

from __future__ import annotations

import logging
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Final

from chromarpc_server.durable import is_out_of_space
from chromarpc_server.jobs.store.ballast import Ballast
from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.jobs.store.unusable import StoreInUse, StoreUnusable

log = logging.getLogger(__name__)

FILE: Final = "jobs.sqlite3"
_BUSY_S: Final = 5.0
"""A tool that reads beside the server may be waited for."""
_NO_ROOM_CODES: Final = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_TRUNCATE}
)
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def is_out_of_room(error: BaseException) -> bool:
    """Whether something could not be written because there is no room for it."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) in _NO_ROOM_CODES
    return isinstance(error, OSError) and is_out_of_space(error)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite found its own file damaged."""
    return isinstance(error, sqlite3.Error) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGE


def open_file(path: Path | None, *, without_shared_memory: bool = False) -> sqlite3.Connection:
    """Opens the file, or makes it, and brings its schema up to date.

    Args:
        path: of the file; None for a database in memory.
        without_shared_memory: writes no file for the log's index, where there is no room for one; then nothing
            else can read the database meanwhile.

    Raises:
        StoreUnusable: it is damaged, in use, or from a newer version. It is left as it is.
        sqlite3.Error: there is no room.
    """
    connection = sqlite3.connect(
        ":memory:" if path is None else path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        with explained(path):
            connection.row_factory = sqlite3.Row
            connection.text_factory = _text
            if without_shared_memory:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            _set_up(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def open_with_ballast(path: Path | None, ballast: Ballast | None) -> sqlite3.Connection:
    """Opens the file on a full disk too: the ballast is given up, and then the log's index is kept in memory.

    Raises:
        StoreUnusable, sqlite3.Error: see `open_file`.
    """
    try:
        return open_file(path)
    except sqlite3.Error as error:
        if ballast is None or not is_out_of_room(error):
            raise
    log.warning("store.full", extra={"doing": "open"})
    ballast.give_up()
    try:
        return open_file(path)
    except sqlite3.Error as error:
        if not is_out_of_room(error):
            raise
    with explained(path, whatever=True):
        return open_file(path, without_shared_memory=True)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def empty_log(connection: sqlite3.Connection) -> bool:
    """Writes everything into the one file and empties the write-ahead log. Returns whether nothing reads it now,
    for then it is not emptied; a reader is not waited for, as everything else would wait too.
    """
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            return bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {round(1000 * _BUSY_S)}")
    return False


def log_bytes(path: Path | None) -> int:
    """Size of the write-ahead log."""
    try:
        return 0 if path is None else path.with_name(path.name + "-wal").stat().st_size
    except OSError:
        return 0


def _text(data: bytes) -> str | bytes:
    """A value that is text. Damaged, it stays bytes, which nothing takes for what was stored: an error of SQLite's
    would cost the whole list, and quote it.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _set_up(connection: sqlite3.Connection, path: Path | None) -> None:
    execute = connection.execute
    version = execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreUnusable(
            f"the job store {path} was written by a newer chromarpc{_writer(connection)} (schema {version}, this "
            f"one knows {len(MIGRATIONS)}): run that version, or give this one another --data-dir"
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
        with transaction(connection):
            for statement in MIGRATIONS[number].split(";\n"):
                execute(statement)
            execute(f"PRAGMA user_version = {number + 1}")
    if version < len(MIGRATIONS):
        execute("INSERT OR REPLACE INTO facts VALUES ('written_by', ?)", (_own_version(),))


def _own_version() -> str:
    try:
        return metadata.version("chromarpc")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return ""


def _writer(connection: sqlite3.Connection) -> str:
    """The version of chromarpc that the file names, where it does."""
    with suppress(sqlite3.Error):
        row = connection.execute("SELECT value FROM facts WHERE name = 'written_by'").fetchone()
        if row is not None and row[0]:
            return f" {row[0]}"
    return ""


@contextmanager
def explained(path: Path | None, *, whatever: bool = False) -> Iterator[None]:
    """Why a file cannot be opened, and what to do.

    Args:
        path: of the file.
        whatever: explains a lack of room too; else more may be tried then.

    Raises:
        StoreUnusable: what SQLite says, in words.
    """
    try:
        yield
    except sqlite3.Error as error:
        if is_out_of_room(error) and not whatever:
            raise
        data_dir = "" if path is None else shlex.quote(str(path.parent.parent))
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreInUse(
                f"the job store {path} is in use by another process: stop that one, or give this server another "
                "--data-dir or --store memory"
            ) from None
        if code in _DAMAGE:
            why = " ".join(str(error).split())
            raise StoreUnusable(
                f"the job store {path} is damaged ({why}) and was left as it is: run "
                f"`chromarpc-server store repair --data-dir {data_dir}`, which saves what can be read and keeps "
                f"the damaged file, or `chromarpc-server store restore BACKUP --replace --data-dir {data_dir}`"
            ) from None
        raise StoreUnusable(
            f"the job store {path} cannot be used ({error}): see that the folder can be written and the disk has "
            "room, or give this server another --data-dir or --store memory"
        ) from None
