"""Lists out of a database that is damaged in places: each row is read by itself, so that one costs no other."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chromarpc_server.jobs.store.rows import AnyRow, LostRow
from chromarpc_server.jobs.store.sqlite_file import is_damage


def lost_rows(
    connection: sqlite3.Connection, owner: str, narrowed: str = "", values: Sequence[Any] = ()
) -> list[LostRow]:
    """An owner's jobs by what the index of owners says, newest first; touches no row.

    Args:
        connection: of the database.
        owner: whose.
        narrowed: a further condition on `created_us` and `id`, beginning with AND.
        values: of its parameters.
    """
    query = (
        f"SELECT id, owner, created_us FROM jobs INDEXED BY jobs_by_owner WHERE owner = ?{narrowed} "  # noqa: S608
        "ORDER BY created_us DESC, id DESC"
    )
    return [LostRow(*row) for row in connection.execute(query, [owner, *values])]


def page_by_row(
    connection: sqlite3.Connection,
    read: Callable[[str], sqlite3.Row | None],
    owner: str,
    narrowed: str,
    values: Sequence[Any],
) -> Iterator[AnyRow]:
    """An owner's jobs that ended, newest first, those that cannot be read as `LostRow`.

    Args:
        connection, owner, narrowed, values: see `lost_rows`.
        read: the row of a job that ended; None for one that has not, or is forgotten.
    """
    for lost in lost_rows(connection, owner, narrowed, values):
        try:
            row = read(lost.id)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            yield lost
        else:
            if row is not None:
                yield row
