"""The jobs that this server knows, by id and by request id: those not ended, and those that ended not long ago.

Lives on the event loop. Jobs that ended stay for a while, oldest first out, within a budget for their pictures.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chromarpc_server.domain.errors import JobNotEnded, JobNotFound, RequestIdReused
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.engine.job import Job


class JobBook:
    """Finds jobs for their owners and forgets them in time."""

    def __init__(self, retention: JobRetention, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that ended jobs age by."""
        self._retention = retention
        self._clock = clock
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        """In the order of admission."""
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

    def existing(self, owner: str, request_id: str | None, fingerprint: str) -> Job | None:
        """The job that this request made before.

        Raises:
            RequestIdReused: another request did, under the same id.
        """
        self.sweep()
        job = self._by_request.get((owner, request_id)) if request_id is not None else None
        if job is not None and job.fingerprint != fingerprint:
            raise RequestIdReused(
                "another request was made under this id",
                field="request_id",
                metadata={"job_id": job.id},
            )
        return job

    def add(self, job: Job) -> None:
        """Enters a job."""
        self._jobs[job.id] = job
        if job.plan.request_id is not None:
            self._by_request[job.owner, job.plan.request_id] = job

    def get(self, owner: str, job_id: str) -> Job:
        """One of the owner's jobs.

        Raises:
            JobNotFound: there is none, or it is somebody else's.
        """
        self.sweep()
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise JobNotFound("there is no such job, or it was deleted", field="job_id")
        return job

    def newest_first(self, owner: str) -> list[Job]:
        """All of the owner's jobs."""
        self.sweep()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def delete(self, owner: str, job_id: str) -> None:
        """Forgets a job that ended.

        Raises:
            JobNotFound: there is none.
            JobNotEnded: it waits or runs.
        """
        job = self.get(owner, job_id)
        if not job.log.closed:
            raise JobNotEnded("the job has not ended; cancel it first", field="job_id")
        self._forget(job)

    def expires_in_s(self, job: Job) -> float | None:
        """How long an ended job stays at most; None for one that has not ended."""
        if job.ended_at is None:
            return None
        return max(0.0, job.ended_at + self._retention.keep_s - self._clock())

    def sweep(self) -> None:
        """Forgets what is too old, and then the oldest of what is too much."""
        ended = [job for job in self._jobs.values() if job.ended_at is not None]
        ended.sort(key=lambda job: job.ended_at or 0.0)
        total = sum(job.log.image_bytes for job in ended)
        now = self._clock()
        for index, job in enumerate(ended):
            too_old = job.ended_at is not None and now - job.ended_at > self._retention.keep_s
            too_much = total > self._retention.keep_bytes or len(ended) - index > self._retention.keep_jobs
            if not (too_old or too_much):
                break
            total -= job.log.image_bytes
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        request_id = job.plan.request_id
        if request_id is not None and self._by_request.get((job.owner, request_id)) is job:
            del self._by_request[job.owner, request_id]
