"""The end of a job: decided, stored, and then visible to its readers.

Every other part of the engine ends jobs through here and nowhere else. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress

from chromarpc_server.domain.errors import (
    ChromaError,
    DeviceError,
    Draining,
    InternalError,
    JobCancelled,
    JobDeadlineExceeded,
    StoreError,
    StoreUnavailable,
)
from chromarpc_server.domain.events import Cancelled, Completed, Failed, Terminal
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.store_thread import ImagesNotStored
from chromarpc_server.jobs.tasks import Tasks

log = logging.getLogger(__name__)

RETRY_AFTER_DRAIN_S = 5.0
RETRY_EVERY_S = 1.0
"""How often the end of a job is tried to be stored again."""
LOOK_EVERY_S = 0.1

_LOG_NAMES: Mapping[type[Terminal], str] = {
    Completed: "job.completed",
    Failed: "job.failed",
    Cancelled: "job.cancelled",
}


class Completion:
    """Ends jobs, or leaves them to the next process."""

    def __init__(self, store: JobStore, registry: JobRegistry, tasks: Tasks) -> None:
        """`store` keeps ends; `registry` lets go of jobs whose end it has; `tasks` are those of the engine."""
        self._store = store
        self._registry = registry
        self._tasks = tasks
        self._unstored: list[Job] = []
        """Jobs whose end is decided and could not be stored yet."""
        self._stopping = asyncio.Event()

    def complete(self, job: Job, event: Completed, fields: Mapping[str, object]) -> None:
        """Ends a job that did all it was to do. `fields` go into the log line."""
        self._end(job, event, fields)

    def end_early(self, job: Job, error: ChromaError) -> None:
        """Ends a job that failed or was cancelled. An end that was decided before stands, but for one that cannot
        be stored: then the job has failed for that reason.
        """
        fields: dict[str, object] = {"reason": error.reason}
        if job.cancellation.requested_at is not None:
            fields["freed_after_ms"] = round(1000 * (time.monotonic() - job.cancellation.requested_at), 1)
        if job.started_at is not None:
            fields["ran_s"] = round(time.monotonic() - job.started_at, 3)
        is_cancelled = isinstance(error, JobCancelled | JobDeadlineExceeded)
        self._end(job, Cancelled(error) if is_cancelled else Failed(error), fields)

    def end_unforeseen(self, job: Job, error: Exception) -> None:
        """Ends a job that an exception nobody foresaw has ended."""
        self.end_early(job, unforeseen(job, error))

    def leave_to_next_process(self, job: Job) -> None:
        """Leaves a job that waits to the next process, or ends it where there is none."""
        if self._store.is_durable:
            job.log.suspend(stopping())
        else:
            self.end_early(job, stopping())

    def set_aside(self, job: Job, error: Draining | DeviceError) -> None:
        """Leaves a job that ran to the next process, unless somebody has cancelled it meanwhile."""
        if job.cancelled_for_good is not None:
            self.end_early(job, job.cancelled_for_good)
            return
        log.warning("job.set_aside", extra={**job.log_fields, "reason": error.reason})
        job.log.suspend(error)

    async def wait_until_visible(self, job: Job) -> None:
        """Returns once an end that is decided is stored, and so can be seen, or cannot be stored now."""
        if job.log.sealed and not job.log.closed:
            async for entry in job.log.follow(job.log.last_sequence, idle_s=LOOK_EVERY_S):
                if entry is None and job in self._unstored:
                    return

    def is_unstored(self, job: Job) -> bool:
        """Whether its end could not be stored yet."""
        return job in self._unstored

    async def store_unstored(self) -> None:
        """Stores the ends that could not be stored.

        Raises:
            StoreUnavailable: one still cannot.
        """
        while self._unstored:
            job = next((job for job in self._unstored if job.log.ending is not None), None)
            if job is None or job.log.ending is None:
                return  # each waits for room by itself
            await self._store.finish(job, job.log.ending)
            self._unstored.remove(job)
            self._registry.ended(job)

    @property
    def is_stopping(self) -> bool:
        """Whether the server stops, and so waits for no room any more."""
        return self._stopping.is_set()

    async def stops_meanwhile(self) -> bool:
        """Waits for as long as something that could not be stored is left alone. Returns whether the server stops,
        and so does not try again.
        """
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._stopping.wait(), RETRY_EVERY_S)
        return False

    def stop_waiting(self) -> None:
        """Leaves jobs whose end cannot be stored to the next process, which runs them again: an end that nobody
        has seen is none.
        """
        self._stopping.set()

    def _end(self, job: Job, event: Terminal, fields: Mapping[str, object]) -> None:
        if not job.log.sealed:
            # A timer that is not needed any more would hold what the job weighs.
            job.stop_expiry()
            job.stop_absence()
            job.log.seal(event)
            self._tasks.start(self._commit(job, event, fields))

    async def _commit(self, job: Job, event: Terminal, fields: Mapping[str, object]) -> None:
        while job.encodings:
            await asyncio.wait(job.encodings)
        try:
            is_stored = await self._store_when_there_is_room(job, event)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has to end
            if isinstance(error, ImagesNotStored):
                error = StoreUnavailable("the job's images could not be stored")
            reason = error if isinstance(error, StoreError) else unforeseen(job, error)
            if isinstance(event, Completed):
                event, fields = Failed(reason), {"reason": reason.reason}
            try:
                is_stored = await self._store_when_there_is_room(job, event)
            except Exception as again:  # noqa: BLE001 - watchers wait for the end, stored or not
                if not isinstance(again, StoreError):
                    unforeseen(job, again)
                is_stored = True
                if job not in self._unstored:
                    self._unstored.append(job)
        if not is_stored:
            job.log.unseal()
            job.log.suspend(stopping())
            return
        job.log.close()
        if job not in self._unstored:
            self._registry.ended(job)
        level = logging.WARNING if isinstance(event, Failed) else logging.INFO
        log.log(level, _LOG_NAMES[type(event)], extra={**job.log_fields, **fields})

    async def _store_when_there_is_room(self, job: Job, event: Terminal) -> bool:
        """Stores a job's end before anybody sees it: one that is told and not stored would have another end after
        a crash. Returns False where the server stops first.

        Raises:
            ImagesNotStored, StoreDamaged: it can never be stored.
        """
        while True:
            try:
                await self._store.finish(job, job.log.seal(event))
            except StoreUnavailable:
                if not self._store.is_durable:
                    raise
            else:
                if job in self._unstored:
                    self._unstored.remove(job)
                return True
            if job not in self._unstored:
                self._unstored.append(job)
            if await self.stops_meanwhile():
                return False


def unforeseen(job: Job, error: Exception) -> InternalError:
    """Logs the exception under a new id, and gives the job's failure, which names the id."""
    error_id = uuid.uuid4().hex[:12]
    log.error(
        "job.internal_error",
        exc_info=error,
        extra={**job.log_fields, "error_id": error_id},
    )
    return InternalError(f"internal error {error_id}", metadata={"error_id": error_id})


def stopping() -> Draining:
    """Why a job does not go on in this process."""
    return Draining("the server is stopping", retry_after_s=RETRY_AFTER_DRAIN_S)
