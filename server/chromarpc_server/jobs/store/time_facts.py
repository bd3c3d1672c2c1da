"""The store's time as the database keeps it, from one process to the next."""

from __future__ import annotations

import sqlite3
import time

from chromarpc_server.jobs.store import rows
from chromarpc_server.jobs.store.sqlite_file import transaction


def keep_time(connection: sqlite3.Connection, now_us: int) -> None:
    """Writes down what time it is."""
    kept = "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    with transaction(connection):
        connection.execute(kept, ("kept_us", now_us))
        connection.execute(kept, ("kept_us_check", rows.time_check(now_us)))


def latest_s(connection: sqlite3.Connection) -> float | None:
    """The store's time as an earlier process left it. By its rows where that is damaged, or was never kept,
    but then no later than the wall clock: jobs are rather kept for too long.
    """
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    kept_us = facts.get("kept_us")
    if isinstance(kept_us, int) and facts.get("kept_us_check") == rows.time_check(kept_us):
        return kept_us / 1e6
    query = "SELECT MAX(admitted_kept_us), MAX(ended_kept_us) FROM jobs"
    found = [time_us for time_us in connection.execute(query).fetchone() if isinstance(time_us, int)]
    return min(max(found) / 1e6, time.time()) if found else None
