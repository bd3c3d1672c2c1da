"""Has a device run jobs, one after the other, as long as it works. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from chromarpc_server.domain.errors import ChromaError, DeviceError, Draining, StoreError, StoreUnavailable
from chromarpc_server.jobs.attempt import Attempt, AttemptRecorder
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import Completion, stopping
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.device import Device
from chromarpc_server.runtime.model_cache import SetKey
from chromarpc_server.runtime.work import Work

log = logging.getLogger(__name__)


POLL_S = 0.2
ROOM_EVERY_POLLS = 10
"""A store that has no room is tried again every 2 s; whether the job is stopped, every 0.2 s."""


class _DeviceTaker:
    """The device as the queue sees it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.used_s = 0.0

    @property
    def model(self) -> str:
        return self._device.description.name

    def can_compute(self, job: Job) -> bool:
        profiles = self._device.description.profiles
        return not profiles or job.plan.profile in profiles

    def is_resident(self, key: SetKey) -> bool:
        return self._device.snapshot.holds(key)

    def has_parsed(self, job: Job) -> bool:
        return all(map(self._device.has_parsed, job.adapter_files))


class Dispatcher:
    """Serves one device."""

    def __init__(
        self,
        device: Device,
        backlog: Backlog,
        recorder: AttemptRecorder,
        completion: Completion,
        store: JobStore,
        tasks: Tasks,
        *,
        on_device_lost: Callable[[], None],
    ) -> None:
        """Starts nothing; see `start`.

        Args:
            device: runs the jobs.
            backlog: has them.
            recorder: takes in what the device reports.
            completion: ends jobs.
            store: counts attempts.
            tasks: those of the engine.
            on_device_lost: called when nothing can be computed in this process any more.
        """
        self._device = device
        self._taker = _DeviceTaker(device)
        self._backlog = backlog
        self._recorder = recorder
        self._completion = completion
        self._store = store
        self._tasks = tasks
        self._on_device_lost = on_device_lost
        self._running: ScheduledJob | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._device_failed = False
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Runs jobs from now on; the device is open."""
        self._backlog.join(self._taker)
        self._loop = asyncio.create_task(self._dispatch(), name="dispatcher")
        self._loop.add_done_callback(self._loop_ended)

    async def finish_running(self, grace_s: float) -> None:
        """Returns once no job runs; the one that runs may take `grace_s`, and is stopped then."""
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            if self._running is not None:
                log.warning("job.grace_over", extra={"job_id": self._running.job.id, "grace_s": grace_s})
            self.stop_running()
            await self._idle.wait()

    def stop_running(self) -> None:
        """Stops the job that runs, within one step, because the server stops."""
        if self._running is not None:
            self._running.job.cancellation.cancel(stopping())

    async def stop(self) -> None:
        """Runs no more jobs."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _dispatch(self) -> None:
        while not self._device_failed:
            scheduled = await self._backlog.next(self._taker)
            self._running = scheduled
            self._idle.clear()
            began = time.monotonic()
            try:
                await self._run(scheduled)
            finally:
                self._taker.used_s += time.monotonic() - began
                self._backlog.ran(self._taker)
                self._running = None
                self._idle.set()
                # An idle server holds on to no job's images.
                del scheduled

    async def _run(self, scheduled: ScheduledJob) -> None:
        job = scheduled.job
        job.started_at = time.monotonic()
        job.started = datetime.now(UTC)
        job.stop_expiry()
        attempt = Attempt(job, self._device.description)
        is_counted = False
        try:
            # Counted before it is made: a job that takes the process down with it must not do so for ever.
            await self._begin(job)
            is_counted = True
            job.attempts += 1
            work = Work(job.id, job.plan, scheduled.model_files, job.adapter_files, job.cancellation)
            done = await self._device.run(work, partial(self._recorder.take, attempt))
        except ChromaError as error:
            if not isinstance(error, Draining | DeviceError):
                self._completion.end_early(job, error)
            elif job.cancelled_for_good is not None or not self._store.is_durable:
                self._completion.end_early(job, job.cancelled_for_good or error)
            else:
                await self._set_aside(job, error, is_counted=is_counted)
            if isinstance(error, DeviceError):
                self._fail()
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._completion.end_unforeseen(job, error)
        else:
            # The next job starts while this one's last image is still being encoded.
            self._tasks.start(self._recorder.finish(attempt, done))

    async def _begin(self, job: Job) -> None:
        """Counts the attempt; on a full disk once there is room, unless the job is stopped meanwhile."""
        while True:
            try:
                return await self._store.begin(job)
            except StoreUnavailable:
                if not self._store.is_durable:
                    raise
            for _ in range(ROOM_EVERY_POLLS):
                job.cancellation.check()
                await asyncio.sleep(POLL_S)

    async def _set_aside(self, job: Job, error: Draining | DeviceError, *, is_counted: bool) -> None:
        """Leaves a job that ran, or waited for room to be counted, to the next process."""
        if isinstance(error, Draining) and is_counted:
            with suppress(StoreError):
                await self._store.unbegin(job)
        self._completion.set_aside(job, error)

    def _fail(self) -> None:
        """Nothing can be computed in this process any more."""
        self._backlog.close()
        self._backlog.leave(self._taker)
        self._device_failed = True
        self._on_device_lost()

    def _loop_ended(self, loop: asyncio.Task[None]) -> None:
        """Without it no job would run, and nobody would notice."""
        if not loop.cancelled() and loop.exception() is not None:
            log.critical("dispatcher.ended", exc_info=loop.exception())
            self._fail()
