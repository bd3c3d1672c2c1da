"""Jobs that wait to run: their adapters are fetched, then they queue. Lives on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import (
    ChromaError,
    Draining,
    QueueFull,
    QueueTimeExceeded,
    QuotaExceeded,
    QuotaViolation,
    StoreError,
)
from chromarpc_server.domain.events import Queued
from chromarpc_server.jobs.completion import RETRY_AFTER_DRAIN_S, Completion
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.queue import JobQueue, ScheduledJob
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.records import known_adapters
from chromarpc_server.runtime.model_cache import SetKey
from chromarpc_server.runtime.running_time import RunningTime


class Backlog:
    """Jobs that wait, and those that run meanwhile, which the others wait for."""

    def __init__(
        self,
        adapters: AdapterSources,
        store: JobStore,
        completion: Completion,
        estimates: StepTimes,
        running_time: RunningTime,
        *,
        max_jobs: int,
    ) -> None:
        """Takes jobs from `open` on.

        Args:
            adapters: fetches what jobs name by URL.
            store: keeps what is known of fetched adapters.
            completion: ends jobs that wait no longer.
            estimates: how long jobs take.
            running_time: the event loop's; jobs wait in it, for one that is paused serves nobody.
            max_jobs: no more may wait.
        """
        self._adapters = adapters
        self._store = store
        self._completion = completion
        self._estimates = estimates
        self._running_time = running_time
        self._max_jobs = max_jobs
        self._queue = JobQueue()
        self._fetching: list[ScheduledJob] = []
        """Jobs whose adapters are being downloaded."""
        self._entering: Counter[str] = Counter()
        """How many jobs of each caller are being stored before they are scheduled."""
        self._running: list[ScheduledJob] = []
        self._arrived = asyncio.Event()
        self._is_open = False

    @property
    def waiting_jobs(self) -> int:
        """How many wait; may be asked from any thread."""
        return len(self._queue) + len(self._fetching)

    @property
    def running_jobs(self) -> int:
        """How many run; may be asked from any thread."""
        return len(self._running)

    def open(self) -> None:
        """Takes jobs from now on."""
        self._is_open = True

    def close(self) -> None:
        """Takes no more jobs; those that wait keep their place."""
        self._is_open = False

    def leave_to_next_process(self) -> None:
        """Leaves the jobs that wait to the next process; `close` comes first."""
        for scheduled in (*self._fetching, *self._queue):
            if scheduled.fetching is not None and not scheduled.fetching.done():
                scheduled.fetching.cancel()
            else:
                self._queue.remove(scheduled)
                scheduled.adapters.release()
            self._completion.leave_to_next_process(scheduled.job)

    def require_room(self, caller: Caller) -> None:
        """Checks that one more job of the caller may wait.

        Raises:
            Draining: no job is taken now.
            QueueFull: as many wait as may.
            QuotaExceeded: as many of the caller's wait as may.
        """
        if not self._is_open:
            raise Draining("the server is starting or stopping", retry_after_s=RETRY_AFTER_DRAIN_S)
        count = self.waiting_jobs + self._entering.total()
        wait_s = self._wait_s(list(self._queue))
        retry_after_s = max(1.0, wait_s / len(self._queue)) if wait_s and self._queue else 5.0
        if count >= self._max_jobs:
            message = f"{count} jobs are waiting already, and no more may"
            raise QueueFull(
                message,
                retry_after_s=retry_after_s,
                quota=QuotaViolation("server", "max_queued_jobs", self._max_jobs, message),
            )
        own = sum(scheduled.job.owner == caller.name for scheduled in (*self._queue, *self._fetching))
        own += self._entering[caller.name]
        if own >= caller.limits.max_queued_jobs:
            raise QuotaExceeded.of(
                "caller",
                "max_queued_jobs",
                caller.limits.max_queued_jobs,
                f"{own} of your jobs are waiting already, and no more may",
                retry_after_s=retry_after_s,
            )

    @contextmanager
    def entering(self, caller: Caller) -> Iterator[None]:
        """Held while a job is stored, so that it counts before it is scheduled."""
        self._entering[caller.name] += 1
        try:
            yield
        finally:
            self._entering[caller.name] -= 1

    def schedule(self, scheduled: ScheduledJob, hf_token: str | None = None, *, may_expire: bool = True) -> None:
        """Puts a job that is stored into the queue, once its adapters are here.

        Args:
            scheduled: the job.
            hf_token: for adapters that are still to be fetched.
            may_expire: whether its time in the queue is limited as its plan says.
        """
        job = scheduled.job
        if not self._is_open:
            self._completion.leave_to_next_process(job)
            return
        if job.plan.max_queue_s is not None and may_expire:
            waited_s = time.monotonic() - job.admitted_at
            job.expiry = self._running_time.call_later(job.plan.max_queue_s - waited_s, self._expire, job)
        if None in scheduled.adapters.files:
            self._fetching.append(scheduled)
            scheduled.fetching = asyncio.create_task(self._fetch(scheduled, hf_token))
        else:
            self._enqueue(scheduled)

    async def next(self, is_resident: Callable[[SetKey], bool]) -> ScheduledJob:
        """Waits for a job to run, and counts it as running until `ran`.

        Args:
            is_resident: whether a device has these prepared weights.
        """
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        scheduled = self._queue.take(is_resident)
        self._running.append(scheduled)
        self._notify_positions()
        return scheduled

    def ran(self, scheduled: ScheduledJob) -> None:
        """A job runs no longer."""
        self._running.remove(scheduled)
        scheduled.adapters.release()

    def cancel(self, job: AnyJob, cause: ChromaError) -> None:
        """Stops a job: at once while it waits, within one step while it runs, not at all once it ended."""
        if not isinstance(job, Job) or job.log.sealed:
            return
        job.cancellation.cancel(cause)
        for scheduled in self._fetching:
            if scheduled.job is job and scheduled.fetching is not None:
                scheduled.fetching.cancel()
                self._completion.end_early(job, cause)
                return
        for scheduled in self._queue:
            if scheduled.job is job:
                self._queue.remove(scheduled)
                scheduled.adapters.release()
                self._completion.end_early(job, cause)
                self._notify_positions()
                return

    def _expire(self, job: Job) -> None:
        """Ends a job that waited too long; one that runs or ended is left alone."""
        if job.started_at is None and not job.log.sealed:
            seconds = job.plan.max_queue_s
            self.cancel(
                job, QueueTimeExceeded(f"the job waited longer than {seconds:g} s", field="max_queue_time")
            )

    async def _fetch(self, scheduled: ScheduledJob, hf_token: str | None) -> None:
        """Downloads a job's adapters; then it joins the queue."""
        job = scheduled.job
        missing = [file is None for file in scheduled.adapters.files]
        try:
            scheduled.adapters = await self._adapters.fetch(
                job.plan.loras, scheduled.adapters, token=hf_token, emit=job.log.append, owner=job.owner
            )
            job.adapter_files = scheduled.adapters.complete
            await self._note_fetched(scheduled, missing)
        except ChromaError as error:
            self._completion.end_early(job, error)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._completion.end_unforeseen(job, error)
        except asyncio.CancelledError:
            scheduled.adapters.release()
            raise
        finally:
            self._fetching.remove(scheduled)
        if job.log.sealed:
            scheduled.adapters.release()
        elif not self._is_open:
            scheduled.adapters.release()
            self._completion.leave_to_next_process(job)
        else:
            self._enqueue(scheduled)

    async def _note_fetched(self, scheduled: ScheduledJob, missing: Sequence[bool]) -> None:
        """What was fetched with a token need not be fetched again after a restart.

        Args:
            scheduled: the job.
            missing: which of its adapters were fetched now; the others may be known from an earlier process.
        """
        job = scheduled.job
        fetched = iter(scheduled.adapters.downloads)
        known = job.adapter_hashes or (None,) * len(missing)
        hashes = [
            next(fetched).sha256 if was_missing else sha256
            for was_missing, sha256 in zip(missing, known, strict=True)
        ]
        with suppress(StoreError):
            await self._store.note_adapters(job, known_adapters(job.adapter_files, hashes))

    def _enqueue(self, scheduled: ScheduledJob) -> None:
        self._queue.add(scheduled)
        self._notify_positions()
        self._arrived.set()

    def _notify_positions(self) -> None:
        wait_s = self._wait_s([])
        for position, scheduled in enumerate(self._queue, 1):
            if scheduled.job.position != position:
                scheduled.job.position = position
                scheduled.job.log.append(Queued(position, wait_s))
            own_s = self._left_s(scheduled.job)
            wait_s = None if wait_s is None or own_s is None else wait_s + own_s

    def _wait_s(self, ahead: Sequence[ScheduledJob]) -> float | None:
        """Seconds until the running jobs and those `ahead` are done; None while nothing was measured."""
        total = 0.0
        for scheduled in (*self._running, *ahead):
            left_s = self._left_s(scheduled.job)
            if left_s is None:
                return None
            total += left_s
        return total

    def _left_s(self, job: Job) -> float | None:
        """Seconds that a job will still take; None while nothing was measured."""
        left = job.plan.pixel_steps - job.pixel_steps_done
        return self._estimates.estimate_s(job.plan.served_model, job.plan.profile, left)
