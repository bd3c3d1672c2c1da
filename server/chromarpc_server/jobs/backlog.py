"""Jobs that wait to run: their adapters are fetched, then they queue. Lives on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
from chromarpc_server.jobs.completion import RETRY_AFTER_DRAIN_S, Completion
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.positions import Positions
from chromarpc_server.jobs.queue import JobQueue, ScheduledJob, Taker
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.records import known_adapters
from chromarpc_server.jobs.waits import Waits
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
        queue: JobQueue | None = None,
    ) -> None:
        """Takes jobs from `open` on.

        Args:
            adapters: fetches what jobs name by URL.
            store: keeps what is known of fetched adapters.
            completion: ends jobs that wait no longer.
            estimates: how long jobs take.
            running_time: the event loop's; jobs wait in it, for one that is paused serves nobody.
            max_jobs: no more may wait.
            queue: says which is next; by default as its constants say.
        """
        self._adapters = adapters
        self._store = store
        self._completion = completion
        self._estimates = estimates
        self._running_time = running_time
        self._max_jobs = max_jobs
        self._queue = JobQueue() if queue is None else queue
        self._positions = Positions(self._queue, self._waits)
        self._fetching: list[ScheduledJob] = []
        """Jobs whose adapters are being downloaded."""
        self._entering: Counter[str] = Counter()
        """How many jobs of each caller are being stored before they are scheduled."""
        self._takers: list[Taker] = []
        self._running: dict[Taker, ScheduledJob] = {}
        self._free: dict[Taker, asyncio.Future[ScheduledJob]] = {}
        """Devices that wait for a job, the first one first; none of them can compute any that waits."""
        self._is_open = False

    @property
    def waiting_jobs(self) -> int:
        """How many wait; may be asked from any thread."""
        return len(self._queue) + len(self._fetching)

    @property
    def waiting(self) -> tuple[ScheduledJob, ...]:
        """Those that wait for a device, in the order in which they will run."""
        return tuple(self._queue)

    @property
    def running_jobs(self) -> int:
        """How many run; may be asked from any thread."""
        return len(self._running)

    @property
    def is_open(self) -> bool:
        """Whether jobs are taken, and given out."""
        return self._is_open

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
        if count >= self._max_jobs:
            message = f"{count} jobs are waiting already, and no more may"
            raise QueueFull(
                message,
                retry_after_s=self._retry_after_s(),
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
                retry_after_s=self._retry_after_s(),
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

    def join(self, taker: Taker) -> None:
        """A device is ready: how long jobs wait is computed with it from now on."""
        self._takers.append(taker)
        self._positions.devices_changed()

    def leave(self, taker: Taker) -> None:
        """A device is ready no longer: it is given no job. What it runs is its own until `ran` or `requeue`."""
        if taker in self._takers:
            self._takers.remove(taker)
        self._free.pop(taker, None)
        self._positions.devices_changed()

    async def next(self, taker: Taker) -> ScheduledJob:
        """Waits for a job for a free device to run, and counts it as running until `ran` or `requeue`. A wait that
        is cancelled loses no job.
        """
        scheduled = self._take(taker)
        while scheduled is None:
            handed = self._free[taker] = asyncio.get_running_loop().create_future()
            try:
                scheduled = await handed
            except asyncio.CancelledError:
                self._free.pop(taker, None)
                self._give_back(taker)
                raise
            if not self._is_open:  # the server began to stop after the job was handed over
                self._give_back(taker)
                scheduled = None
        return scheduled

    def ran(self, taker: Taker) -> None:
        """A device's job runs no longer, or was put back before."""
        scheduled = self._running.pop(taker, None)
        if scheduled is not None:
            scheduled.adapters.release()

    def requeue(self, scheduled: ScheduledJob) -> None:
        """Puts a job whose device was lost before all that wait, its files with it; another device may take it at
        once.
        """
        for taker, running in self._running.items():
            if running is scheduled:
                del self._running[taker]
                break
        if not self._is_open:
            scheduled.adapters.release()
            self._completion.leave_to_next_process(scheduled.job)
            return
        job = scheduled.job
        job.position = job.done_steps = job.pixel_steps_done = 0
        job.started = job.started_at = None
        self._queue.put_back(scheduled)
        self._arrived(scheduled)

    def offer(self, scheduled: ScheduledJob) -> None:
        """More devices may run a job that waits: a free one gets it at once."""
        self._hand_over(scheduled.job)

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
                self._positions.changed()
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
        self._arrived(scheduled)

    def _arrived(self, scheduled: ScheduledJob) -> None:
        """A job has come to wait."""
        self._positions.changed(scheduled)
        self._hand_over(scheduled.job)

    def _hand_over(self, job: Job) -> None:
        """The best of the free devices that can compute a job that waits gets it at once."""
        able = [taker for taker, handed in self._free.items() if not handed.done() and taker.can_compute(job)]
        if able:
            key = job.set_key
            best = min(able, key=lambda taker: _preference(taker, job, key))
            taken = self._take(best)
            if taken is not None:
                self._free.pop(best).set_result(taken)

    def _retry_after_s(self) -> float:
        """Seconds until about one more may wait."""
        all_s = self._waits().add_all(scheduled.job for scheduled in self._queue)
        return max(1.0, all_s / len(self._queue)) if all_s and self._queue else 5.0

    def _take(self, taker: Taker) -> ScheduledJob | None:
        scheduled = self._queue.take(taker)
        if scheduled is not None:
            self._running[taker] = scheduled
            self._positions.changed()
        return scheduled

    def _give_back(self, taker: Taker) -> None:
        """Of a job that was handed to a device that did not get to run it."""
        scheduled = self._running.get(taker)
        if scheduled is not None:
            self.requeue(scheduled)

    def _waits(self) -> Waits:
        running = {taker: scheduled.job for taker, scheduled in self._running.items()}
        return Waits(self._estimates, [(taker, running.get(taker)) for taker in self._takers])


def _preference(taker: Taker, job: Job, key: SetKey) -> tuple[bool, bool, float]:
    """The least is the best one for a job that has come: where it runs at once, then where its adapters need not
    be read, then the one that was used least.
    """
    return not taker.is_resident(key), not taker.has_parsed(job), taker.used_s
