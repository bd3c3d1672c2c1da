"""The database as tools read it: beside a running server, and page by page where some are damaged."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from chromarpc_server.domain.errors import JobDamaged
from chromarpc_server.domain.events import Accepted
from chromarpc_server.jobs.store import records, rows
from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.jobs.store.sqlite_file import is_damage
from chromarpc_server.maintenance.report import CannotBeDone

PATIENCE_S = 10.0
"""How long a lock of the server's is waited for; it holds them for one statement."""
_MAX_DAMAGES = 5
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, zlib.error)


@contextmanager
def opened_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """Opens a database to read it; changes nothing in it, whatever another process left in its WAL.

    Raises:
        CannotBeDone: it is locked, or no file that can be opened.
        sqlite3.DatabaseError: it is damaged; from here on or from any statement.
    """
    try:
        # Opened for nothing but to say why not: SQLite says no more than that it was unable to.
        path.open("rb").close()
    except OSError as error:
        raise CannotBeDone(f"{path} cannot be read ({error.strerror}): see to it, then run this again") from None
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=PATIENCE_S, isolation_level=None
    )
    connection.row_factory = sqlite3.Row
    try:
        yield connection
    except sqlite3.Error as error:
        raise _explained(path, error) from None
    finally:
        connection.close()


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another process keeps this one from the file."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_unreadable(error: sqlite3.Error) -> bool:
    """Whether it is the file that is wrong, its tables among it, and not the disk or another process."""
    return is_damage(error) or getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) == sqlite3.SQLITE_ERROR


def opened_to_write(path: Path) -> sqlite3.Connection:
    """Opens a database that no server has; what is deleted in it is overwritten."""
    connection = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _explained(path: Path, error: sqlite3.Error) -> Exception:
    if is_locked(error):
        return CannotBeDone(f"{path} is locked by another process: stop that one, or run this again later")
    if is_damage(error) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
        return error  # the latter: a table is missing
    return CannotBeDone(f"{path} cannot be read ({error}): see to its folder, then run this again")


def require_known_schema(connection: sqlite3.Connection, path: Path) -> int:
    """The version of the schema.

    Raises:
        CannotBeDone: it is one that this version does not know.
        sqlite3.DatabaseError: the database is damaged.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise CannotBeDone(
            f"{path} was written by a newer chromarpc (schema {version}, this one knows {len(MIGRATIONS)}): run "
            "that version's tools"
        )
    return version


def damages(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong in the file; nothing where it is sound."""
    try:
        found = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MAX_DAMAGES})")]
    except sqlite3.DatabaseError as error:
        if is_locked(error):
            raise
        return [str(error)]
    return [] if found == ["ok"] else [" ".join(text.split()) for text in found]


def numbers(connection: sqlite3.Connection) -> list[int]:
    """The numbers of all jobs, those of damaged pages included as far as an index still has them."""
    scans = ["NOT INDEXED ORDER BY number", "NOT INDEXED ORDER BY number DESC"]
    with suppress(sqlite3.DatabaseError):
        # An index has every job's number, and lies on other pages than the jobs.
        scans += [f'INDEXED BY "{index["name"]}"' for index in connection.execute("PRAGMA index_list(jobs)")]
    found: set[int] = set()
    for scan in scans:
        try:
            for row in connection.execute(f"SELECT number FROM jobs {scan}"):  # noqa: S608 - names of ours
                found.add(row[0])
        except sqlite3.DatabaseError:
            continue  # the rest is found by another scan, or not at all
    return sorted(number for number in found if isinstance(number, int))


def job_ids(connection: sqlite3.Connection) -> dict[str, int]:
    """The number of each job, by its id; without those whose pages are damaged."""
    found = {}
    for number in numbers(connection):
        with suppress(sqlite3.DatabaseError):
            for (job_id,) in connection.execute("SELECT id FROM jobs WHERE number = ?", (number,)):
                found[job_id] = number
    return found


def row(connection: sqlite3.Connection, number: int) -> sqlite3.Row | None:
    """A job's row; None where there is none.

    Raises:
        sqlite3.DatabaseError: its pages are damaged.
    """
    found: sqlite3.Row | None = connection.execute("SELECT * FROM jobs WHERE number = ?", (number,)).fetchone()
    return found


def judged(connection: sqlite3.Connection, number: int) -> tuple[sqlite3.Row | None, str | None]:
    """A job's row as far as it can be read, and what keeps a server from reading it; neither where it is gone."""
    try:
        found = row(connection, number)
    except sqlite3.DatabaseError as error:
        if is_locked(error):
            raise
        return None, f"its pages are damaged ({error})"
    return found, None if found is None else why_unreadable(found)


def why_unreadable(found: sqlite3.Row) -> str | None:
    """What keeps a server from reading a job; None where nothing does. Quotes nothing of it."""
    what = "plan"
    try:
        if _has_checks(found):
            rows.require_readable(found)
        records.read_plan(found["plan"])
        what = "list of adapters"
        records.read_adapters(found["adapters"])
        if found["ended_us"] is not None:
            what = "end"
            records.read_ending(found["ending"])
            what = "list of images"
            records.read_headers(found["headers"])
    except JobDamaged as error:
        return error.message
    except _UNREADABLE:
        return f"its {what} cannot be read"
    return None


def why_events_unreadable(found: sqlite3.Row) -> str | None:
    """What keeps a server from telling the events of a job that it can read; None where nothing does."""
    if found["ended_us"] is None:
        return None
    try:
        if _has_checks(found):
            rows.require_events(found["id"], found["events"], found["events_check"])
        records.unpack_events(found["events"], Accepted(found["id"], records.read_plan(found["plan"])))
    except (JobDamaged, *_UNREADABLE):
        return "its events cannot be read"
    return None


def _has_checks(found: sqlite3.Row) -> bool:
    """Rows of earlier schemas have none."""
    return "format" in found.keys()  # noqa: SIM118 - iterated, a row gives its values


def is_newer(found: sqlite3.Row) -> bool:
    """Whether a row is in a format that only a newer version reads."""
    return _has_checks(found) and found["format"] not in rows.READABLE


def images_of(found: sqlite3.Row) -> list[str]:
    """Hashes of the images of a row that can be read."""
    if found["ended_us"] is None:
        return []
    return list(dict.fromkeys(header.sha256 for header in records.read_headers(found["headers"])))


def named_images(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """Ids of the jobs that name each image.

    Raises:
        sqlite3.DatabaseError: the list of them is damaged.
    """
    found: dict[str, list[str]] = {}
    for sha256, job_id in connection.execute("SELECT sha256, job FROM images ORDER BY sha256, job"):
        found.setdefault(sha256, []).append(job_id)
    return found


def jobs_naming(connection: sqlite3.Connection, sha256: str) -> list[str]:
    """Ids of the jobs that name an image now.

    Raises:
        sqlite3.DatabaseError: the list of them is damaged.
    """
    return [job for (job,) in connection.execute("SELECT job FROM images WHERE sha256 = ?", (sha256,))]


def intended_images(connection: sqlite3.Connection) -> set[str]:
    """Images that may lie in the folder although no job names them; none in earlier schemas."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'image_intents'").fetchone() is None:
        return set()
    return {sha256 for (sha256,) in connection.execute("SELECT sha256 FROM image_intents")}
