"""The jobs that this server knows, for their owners.

Those that have not ended are here, the others in the store. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from chromarpc_server.domain.errors import JobDamaged, JobNotEnded, JobNotFound, RequestIdReused
from chromarpc_server.domain.events import Cancelled, Completed, Failed
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.job import AnyJob, DamagedJob, Job
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.jobs.store import records
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.rows import CANCELLED, FAILED, SUCCEEDED
from chromarpc_server.jobs.submission import Fingerprint

QUEUED, RUNNING = "queued", "running"
_ENDED = frozenset({SUCCEEDED, FAILED, CANCELLED})


def state_of(job: AnyJob) -> str:
    """`queued`, `running`, `succeeded`, `failed` or `cancelled`."""
    match None if job.log.ending is None else job.log.ending.event:
        case Completed():
            return SUCCEEDED
        case Cancelled():
            return CANCELLED
        case Failed():
            return FAILED
        case _:
            return QUEUED if job.started is None else RUNNING


@dataclass(frozen=True)
class Selection:
    """Which of a caller's jobs to list."""

    before: tuple[int, str] | None = None
    """Only those admitted before this time, in microseconds since the epoch, and id."""
    since: datetime | None = None
    """Only those admitted at or after this time."""
    states: Collection[str] | None = None

    def takes(self, job: Job) -> bool:
        """Whether it is one of them."""
        return self.takes_place(place(job)) and (self.states is None or state_of(job) in self.states)

    def takes_place(self, at: tuple[int, str]) -> bool:
        """Whether a job that was admitted then is one of them, whatever its state."""
        return (self.before is None or at < self.before) and (
            self.since is None or at[0] >= records.microseconds(self.since)
        )


def place(job: AnyJob | DamagedJob) -> tuple[int, str]:
    """Where it is among all jobs, by admission."""
    return records.microseconds(job.created), job.id


class JobRegistry:
    """Finds jobs for their owners."""

    def __init__(self, store: JobStore, retention: JobRetention, observers: Sequence[JobObserver] = ()) -> None:
        """`store`: has those that ended; `observers`: are notified of every event of the others."""
        self._observers = tuple(observers)
        self._store = store
        self._retention = retention
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        """Those that have not ended, or whose end could not be stored, in the order of admission."""
        self._by_request: dict[tuple[str, str], Job] = {}
        self._creating: dict[tuple[str, str], asyncio.Lock] = {}

    @asynccontextmanager
    async def creating(self, owner: str, request_id: str | None) -> AsyncIterator[None]:
        """Held while a job is made for a request id, so that two calls under one id make one job."""
        if request_id is None:
            yield
            return
        key = (owner, request_id)
        lock = self._creating.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._creating.get(key) is lock:
                del self._creating[key]

    async def existing(self, owner: str, request_id: str | None, fingerprint: Fingerprint) -> AnyJob | None:
        """The job that this request made before.

        Raises:
            RequestIdReused: another request did, under the same id.
            StoreUnavailable: the store cannot be read now.
        """
        if request_id is None:
            return None
        job: AnyJob | None = self._by_request.get((owner, request_id))
        job = job or await self._store.ended_by_request(owner, request_id)
        if job is not None and not fingerprint.matches(job.fingerprint):
            raise RequestIdReused(
                "another request was made under this id",
                field="request_id",
                metadata={"job_id": job.id},
            )
        return job

    async def made_under(self, owner: str, request_id: str) -> AnyJob:
        """The job that was made under a request id, and is being made now at the latest.

        Raises:
            JobNotFound: there is none.
            StoreUnavailable: the store cannot be read now.
        """
        async with self.creating(owner, request_id):
            job: AnyJob | None = self._by_request.get((owner, request_id))
            job = job or await self._store.ended_by_request(owner, request_id)
        if job is None:
            raise JobNotFound("no job was made under this id, or it was deleted", field="request_id")
        return job

    def unfinished(self) -> Collection[Job]:
        """Everybody's jobs that have not ended."""
        return self._jobs.values()

    def add(self, job: Job) -> None:
        """Enters a job that the store has, before its first event."""
        for observer in self._observers:
            job.log.observe(partial(observer.on_event, job), observer.on_read)
        self._jobs[job.id] = job
        if job.plan.request_id is not None:
            self._by_request[job.owner, job.plan.request_id] = job

    def ended(self, job: Job) -> None:
        """Leaves a job to the store, which has its end."""
        self._jobs.pop(job.id, None)
        request_id = job.plan.request_id
        if request_id is not None and self._by_request.get((job.owner, request_id)) is job:
            del self._by_request[job.owner, request_id]

    async def get(self, owner: str, job_id: str) -> AnyJob:
        """One of the owner's jobs.

        Raises:
            JobNotFound: there is none, or it is somebody else's.
            JobDamaged: what is stored of it cannot be read.
            StoreUnavailable, StoreDamaged: the store cannot be read.
        """
        job: AnyJob | None = self._jobs.get(job_id)
        job = job or await self._store.ended(owner, job_id)
        if job is None or job.owner != owner:
            raise JobNotFound("there is no such job, or it was deleted", field="job_id")
        return job

    async def page(self, owner: str, limit: int, selection: Selection) -> list[AnyJob | DamagedJob]:
        """The owner's jobs, newest admission first, at most `limit`; those that cannot be read are among them.

        Raises:
            StoreUnavailable, StoreDamaged: the store cannot be read.
        """
        # Those here first: one that ends meanwhile is then found twice, and never not at all.
        found: dict[str, AnyJob | DamagedJob] = {
            job.id: job for job in self._jobs.values() if job.owner == owner and selection.takes(job)
        }
        found |= {
            job.id: job
            for job in self._store.unreadable_jobs()
            if job.owner == owner
            and selection.takes_place(place(job))
            and (selection.states is None or FAILED in selection.states)
        }
        ended = None if selection.states is None else sorted(_ENDED & set(selection.states))
        if ended is None or ended:
            since = selection.since
            for job in await self._store.page(
                owner,
                limit,
                before=selection.before,
                since_us=None if since is None else records.microseconds(since),
                states=ended,
            ):
                found.setdefault(job.id, job)
        return sorted(found.values(), key=place, reverse=True)[:limit]

    async def delete(self, owner: str, job_id: str) -> None:
        """Forgets a job that ended.

        Raises:
            JobNotFound: there is none.
            JobNotEnded: it waits or runs.
            StoreUnavailable, StoreDamaged: it cannot be forgotten.
        """
        try:
            job: AnyJob | None = await self.get(owner, job_id)
        except JobDamaged:  # its owner's, and gone with all that is left of it
            job = None
        if job is not None and not job.log.closed:
            raise JobNotEnded("the job has not ended; cancel it first", field="job_id")
        if not await self._store.delete(job_id):
            raise JobNotFound("there is no such job, or it was deleted", field="job_id")

    def expires(self, job: AnyJob) -> datetime | None:
        """When an ended job is forgotten at the latest; None for one that has not ended."""
        ending = job.log.ending
        return None if ending is None else ending.time + timedelta(seconds=self._retention.keep_s)
