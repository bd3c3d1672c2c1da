"""From rows to jobs. A row that cannot be read is its job's trouble, and nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

from chromarpc_server.domain.errors import JobDamaged
from chromarpc_server.domain.events import Accepted, ImageHeader
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.encoding import CHUNK_BYTES
from chromarpc_server.jobs.job import DamagedJob, EndedJob
from chromarpc_server.jobs.log import EndedLog, StoredEvent, StoredImage
from chromarpc_server.jobs.store import records, rows
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.jobs.store.rows import AnyRow, LostRow

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredRequest:
    """What a job was asked for, and what it takes to draw the same again."""

    owner: str
    plan: Plan
    has_prompts: bool
    """Whether the plan says what to draw."""
    needs_token: bool
    """Whether one of its URLs was given with a token, which is not stored."""
    adapters: tuple[KnownAdapter | None, ...]
    """What is known of each; None for one that was not fetched."""


@dataclass(frozen=True)
class Unfinished(StoredRequest):
    """A job that an earlier process was to run."""

    id: str
    fingerprint: str
    created_us: int
    admitted_kept_us: int
    """In the store's own time."""
    starts: int
    """Processes that took it over, this one included."""
    attempts: int
    """How often it was begun, but for stops in good order."""
    was_begun: bool
    """Whether it ever was."""
    is_cancelled: bool
    """Whether its cancellation was acknowledged."""


def unfinished_job(row: rows.Row) -> Unfinished:
    """A job that did not end.

    Raises:
        JobDamaged: the row cannot be read; the error quotes nothing of it.
    """

    def read() -> Unfinished:
        return Unfinished(
            id=row["id"],
            **vars(_request(row)),
            fingerprint=row["fingerprint"],
            created_us=row["created_us"],
            admitted_kept_us=row["admitted_kept_us"],
            starts=row["starts"],
            attempts=row["attempts"],
            was_begun=row["started_us"] is not None,
            is_cancelled=bool(row["cancelled"]),
        )

    return _readable(row, read)


def stored_request(row: AnyRow) -> StoredRequest:
    """What a job that ended was asked for.

    Raises:
        JobDamaged: the row cannot be read; the error quotes nothing of it.
    """
    if isinstance(row, LostRow):
        raise _lost(row)
    return _readable(row, lambda: _request(row))


def ended_job(
    row: AnyRow,
    load: Callable[[str, Accepted], Awaitable[tuple[StoredEvent, ...]]],
    open_image: Callable[[str, ImageHeader], Awaitable[StoredImage]],
) -> EndedJob:
    """A job that ended.

    Args:
        row: with the columns of `jobs` but events.
        load: gets the events of the job with an id.
        open_image: gets an image of the job with an id.

    Raises:
        JobDamaged: the row cannot be read; the error quotes nothing of it.
    """
    if isinstance(row, LostRow):
        raise _lost(row)

    def read() -> EndedJob:
        plan, job_id, started_us = _plan(row), row["id"], row["started_us"]
        accepted = Accepted(job_id, plan)
        return EndedJob(
            plan=plan,
            owner=row["owner"],
            id=job_id,
            log=EndedLog(
                records.read_ending(row["ending"]),
                records.read_headers(row["headers"]),
                load=lambda: load(job_id, accepted),
                open_image=lambda header: open_image(job_id, header),
                chunk_bytes=CHUNK_BYTES,
            ),
            fingerprint=row["fingerprint"],
            created=records.from_microseconds(row["created_us"]),
            started=None if started_us is None else records.from_microseconds(started_us),
            attempts=row["attempts"],
            done_steps=row["done_steps"],
        )

    return _readable(row, read)


def damaged_job(row: AnyRow, error: JobDamaged) -> DamagedJob:
    """What a list says of a job that cannot be read."""
    if isinstance(row, LostRow):
        return DamagedJob(row.id, row.owner, None, _created(row.created_us), error)
    return DamagedJob(row["id"], row["owner"], row["request_id"], _created(row["created_us"]), error)


def read_events(job_id: str, events: bytes, check: str | None, accepted: Accepted) -> tuple[StoredEvent, ...]:
    """A job's events.

    Raises:
        JobDamaged: they cannot be read.
    """
    try:
        rows.require_events(job_id, events, check)
        return records.unpack_events(events, accepted)
    except JobDamaged as error:
        raise _logged(error) from None
    except Exception:  # noqa: BLE001 - whatever it is, its message may quote what it could not read
        raise _logged(rows.damaged(job_id, "its events are damaged")) from None


def _request(row: rows.Row) -> StoredRequest:
    return StoredRequest(
        owner=row["owner"],
        plan=_plan(row),
        has_prompts=bool(row["has_prompts"]),
        needs_token=bool(row["needs_token"]),
        adapters=records.read_adapters(row["adapters"]),
    )


def _created(time_us: object) -> datetime:
    """When a job that is damaged was admitted; the epoch where that is damaged too."""
    try:
        return records.from_microseconds(time_us) if isinstance(time_us, int) else records.from_microseconds(0)
    except OverflowError:
        return records.from_microseconds(0)


def _plan(row: rows.Row) -> Plan:
    plan = records.read_plan(row["plan"])
    return replace(plan, detached=True) if row["detached"] else plan


def _readable(row: rows.Row, read: Callable[[], _T]) -> _T:
    try:
        rows.require_readable(row)
        return read()
    except JobDamaged as error:
        raise _logged(error) from None
    except Exception:  # noqa: BLE001 - whatever it is, its message may quote what it could not read: prompts
        raise _logged(rows.damaged(row["id"], "its columns are damaged")) from None


def _lost(row: LostRow) -> JobDamaged:
    return _logged(rows.damaged(row.id, "its row in the database is damaged"))


def _logged(error: JobDamaged) -> JobDamaged:
    log.error("store.row_unreadable", extra={"job_id": error.metadata.get("job_id", ""), "problem": error.message})
    return error
