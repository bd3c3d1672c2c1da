"""Rows of jobs, and whether one still says what was written: its format is known, its checksums are right.

SQLite notices damage of its own structure, not of what is in it: a flipped bit of a plan would be another plan.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from chromarpc_server.domain.errors import JobDamaged

SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
FORMAT: Final = 2
"""Of plans, events and endings as `records` writes them. 1 was written without checksums, and reads the same."""
READABLE: Final = frozenset({1, 2})
"""Formats that this version knows."""
_PLAN: Final = (
    "id",
    "owner",
    "fingerprint",
    "created_us",
    "admitted_kept_us",
    "plan",
    "has_prompts",
    "needs_token",
)
_END: Final = ("id", "ended_us", "ended_kept_us", "state", "done_steps", "ending", "headers")


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


@dataclass(frozen=True)
class LostRow:
    """A job that ended and whose row SQLite cannot read; what its indexes still say."""

    id: str
    owner: str
    created_us: int


AnyRow = sqlite3.Row | LostRow


class Row(Protocol):
    """A row by its columns, as `sqlite3.Row`."""

    def __getitem__(self, column: str, /) -> Any:
        """One value."""


def plan_check(row: Row) -> str:
    """Over what a job's admission wrote, hexadecimal."""
    return _checksum(row[column] for column in _PLAN)


def end_check(row: Row) -> str:
    """Over what its end wrote, but for events."""
    return _checksum(row[column] for column in _END)


def is_end_intact(row: Row) -> bool:
    """Whether what a job's end wrote is what it says now; also where there is no checksum."""
    return row["end_check"] is None or row["end_check"] == end_check(row)


def stored_bytes(row: Row) -> int:
    """Of an ended job's events and images, as far as its row can be read.

    Args:
        row: with the columns of an end, and `events_bytes`.
    """
    images = 0
    with suppress(ValueError, TypeError, KeyError):
        if is_end_intact(row):
            images = sum(int(header["size_bytes"]) for header in json.loads(row["headers"]))
    return images + int(row["events_bytes"] or 0)


def time_check(kept_us: int) -> str:
    """Over the store's time, which a flipped bit would move by years."""
    return _checksum(["kept_us", kept_us])


def events_check(events: bytes) -> str:
    """Over its events."""
    return hashlib.sha256(events).hexdigest()


def require_readable(row: Row) -> None:
    """Checks all columns of a job but its events.

    Args:
        row: with the columns of `jobs`.

    Raises:
        JobDamaged: it was written in a format that this version does not know, or is damaged.
    """
    if row["format"] not in READABLE:
        raise damaged(row["id"], f"it is stored in format {row['format']}, of a newer chromarpc")
    if row["plan_check"] is not None and row["plan_check"] != plan_check(row):
        raise damaged(row["id"], "its plan is damaged")
    if row["ended_us"] is not None and not is_end_intact(row):
        raise damaged(row["id"], "its end is damaged")


def require_events(job_id: str, events: bytes, check: str | None) -> None:
    """Checks a job's events.

    Raises:
        JobDamaged: they are damaged.
    """
    if check is not None and check != events_check(events):
        raise damaged(job_id, "its events are damaged")


def damaged(job_id: str, why: str) -> JobDamaged:
    """The error of a job that cannot be read, for its owner; `why` quotes nothing of it."""
    return JobDamaged(
        f"what is stored of the job cannot be read: {why}", field="job_id", metadata={"job_id": str(job_id)}
    )


def _checksum(values: Iterable[object]) -> str:
    # As SQLite gives them back.
    values = [int(value) if isinstance(value, bool) else value for value in values]
    # A damaged value may be of any type: bytes, of which SQLite's rows have none here, are written as no text is.
    return hashlib.sha256(json.dumps(values, separators=(",", ":"), default=list).encode()).hexdigest()
