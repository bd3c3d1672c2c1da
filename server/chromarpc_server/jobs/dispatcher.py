"""Has a device run jobs, one after the other, as long as it works. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from chromarpc_server.domain.devices import DeviceState
from chromarpc_server.domain.errors import (
    AttemptsExhausted,
    ChromaError,
    DeviceError,
    DeviceLost,
    Draining,
    StoreError,
    StoreUnavailable,
)
from chromarpc_server.domain.events import Restarted
from chromarpc_server.jobs.attempt import Attempt, AttemptRecorder
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import Completion, stopping
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.device import Device, DeviceStatus
from chromarpc_server.runtime.model_cache import SetKey
from chromarpc_server.runtime.work import Work

log = logging.getLogger(__name__)


POLL_S = 0.2
ROOM_EVERY_POLLS = 10
"""A store that has no room is tried again every 2 s; whether the job is stopped, every 0.2 s."""


@dataclass(frozen=True)
class Left:
    """What there is once a device is lost."""

    devices: Sequence[Dispatcher] = ()
    more_may_come: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether no job can run in this process any more."""
        return not self.devices and not self.more_may_come


class Dispatcher:
    """Serves one device, and is that device to the queue."""

    def __init__(
        self,
        device: Device,
        backlog: Backlog,
        recorder: AttemptRecorder,
        completion: Completion,
        store: JobStore,
        tasks: Tasks,
        *,
        max_attempts: int,
        on_lost: Callable[[Dispatcher, DeviceError], Left],
    ) -> None:
        """Starts nothing; see `start`.

        Args:
            device: runs the jobs; opened.
            backlog: has them.
            recorder: takes in what the device reports.
            completion: ends jobs.
            store: counts attempts.
            tasks: those of the engine.
            max_attempts: a job that was begun as often on devices that were lost is not begun again.
            on_lost: called once the device is lost; returns what is left for its job.
        """
        self.device = device
        self.state = DeviceState.OPENING
        self.used_s = 0.0
        """That the device has spent on jobs."""
        self._backlog = backlog
        self._recorder = recorder
        self._completion = completion
        self._store = store
        self._tasks = tasks
        self._max_attempts = max_attempts
        self._on_lost = on_lost
        self._running: ScheduledJob | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._jobs = 0
        self._lost_because = ""
        self._loop: asyncio.Task[None] | None = None

    @property
    def model(self) -> str:
        """What GPU or CPU it is."""
        return self.device.description.name

    def can_compute(self, job: Job) -> bool:
        """Whether the device has the job's profile, and is of the model that the job is to stay on, if any."""
        profiles = self.device.description.profiles
        return (not profiles or job.plan.profile in profiles) and job.stays_on in ("", self.model)

    def is_resident(self, key: SetKey) -> bool:
        """Whether the device has these prepared weights."""
        return self.device.snapshot.holds(key)

    def has_parsed(self, job: Job) -> bool:
        """Whether no adapter of the job has to be read from its file."""
        return all(self.device.has_parsed(file) for file in job.adapter_files)

    def status(self) -> DeviceStatus:
        """The device now; may be asked for from any thread."""
        is_lost = self.state is DeviceState.LOST
        return DeviceStatus(
            self.device.description,
            self.state,
            self.device.snapshot,
            0 if is_lost else self.device.memory_used_bytes(),
            self._jobs,
            self.used_s,
            self._lost_because,
        )

    def start(self) -> None:
        """Runs jobs from now on."""
        self.state = DeviceState.IDLE
        self._loop = asyncio.create_task(self._dispatch(), name=f"dispatcher {self.device.description.id}")
        self._loop.add_done_callback(self._loop_ended)

    def give_up(self, error: DeviceError) -> Left:
        """The device is of no use any more. Returns what is left for its job."""
        self.state, self._lost_because = DeviceState.LOST, error.message
        return self._on_lost(self, error)

    async def finish_running(self, grace_s: float) -> None:
        """Returns once no job runs; the one that runs may take `grace_s`, and is stopped then."""
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            if self._running is not None:
                log.warning("job.grace_over", extra={**self._running.job.log_fields, "grace_s": grace_s})
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
        losing = asyncio.create_task(self.device.lost(), name=f"watch {self.device.description.id}")
        try:
            while (scheduled := await self._next(losing)) is not None:
                self._running, self.state = scheduled, DeviceState.BUSY
                self._idle.clear()
                try:
                    lost = await self._run(scheduled)
                    if lost is not None:
                        return
                finally:
                    self._backlog.ran(self)
                    self._running = None
                    self._idle.set()
                    # An idle server holds on to no job's images.
                    del scheduled
                self.state = DeviceState.IDLE
            self.give_up(losing.result())
        finally:
            losing.cancel()

    async def _next(self, losing: asyncio.Task[DeviceError]) -> ScheduledJob | None:
        """The next job; None where the device is found to be lost first."""
        while True:
            taking = asyncio.ensure_future(self._backlog.next(self))
            try:
                await asyncio.wait({taking, losing}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                if taking.done():
                    self._backlog.requeue(taking.result())
                raise
            finally:
                if not taking.done():
                    taking.cancel()  # the backlog has the job that it might have given
                    await asyncio.gather(taking, return_exceptions=True)
            if taking.cancelled():
                return None
            if self._backlog.is_open and not losing.done():
                return taking.result()
            # Since it was taken the device was lost, or the server began to stop, which waits for no job that had
            # not begun.
            self._backlog.requeue(taking.result())
            if losing.done():
                return None

    async def _run(self, scheduled: ScheduledJob) -> DeviceError | None:
        """Has the device run a job. Returns why the device is lost, where it is."""
        job, description = scheduled.job, self.device.description
        job.started_at = began_s = time.monotonic()
        job.started, job.device_id = datetime.now(UTC), description.id
        job.stop_expiry()
        attempt = Attempt(job, description)
        is_counted = False
        self._jobs += 1
        try:
            # Counted before it is made: a job that takes the process down with it must not do so for ever.
            await self._begin(job)
            is_counted = True
            job.attempts += 1
            work = Work(job.id, job.plan, scheduled.model_files, job.adapter_files, job.cancellation)
            log.info("job.begun", extra={**job.log_fields, "attempt": job.attempts})
            done = await self.device.run(work, partial(self._recorder.take, attempt))
        except DeviceError as error:
            attempt.is_over = True
            self._after_loss(scheduled, error, self.give_up(error))
            return error
        except ChromaError as error:
            if not isinstance(error, Draining):
                self._completion.end_early(job, error)
            elif job.cancelled_for_good is not None or not self._store.is_durable:
                self._completion.end_early(job, job.cancelled_for_good or error)
            else:
                await self._set_aside(job, error, is_counted=is_counted)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._completion.end_unforeseen(job, error)
        else:
            # The next job starts while this one's last image is still being encoded.
            self._tasks.start(self._recorder.finish(attempt, done))
        finally:
            self.used_s += time.monotonic() - began_s
        return None

    def _after_loss(self, scheduled: ScheduledJob, error: DeviceError, left: Left) -> None:
        """What becomes of the job that the device ran when it was lost."""
        job = scheduled.job
        if job.log.sealed:
            return
        cause = job.cancelled_for_good or job.cancellation.cause
        able = [other for other in left.devices if other.can_compute(job)]
        if cause is not None and not isinstance(cause, Draining):
            self._completion.end_early(job, cause)
        elif cause is not None or left.is_nothing:
            if self._store.is_durable:
                self._completion.set_aside(job, error)
            else:
                self._completion.end_early(job, cause or error)
        elif job.attempts >= self._max_attempts:
            message = f"the job's device was lost {job.attempts} times, and the job is tried no more"
            attempts = {"attempts": str(job.attempts)}
            self._completion.end_early(job, AttemptsExhausted(message, metadata=attempts))
        elif not able and not left.more_may_come:
            self._completion.end_early(job, no_device_for(job))
        else:
            has_same = any(other.model == self.model for other in able)
            job.stays_on = self.model if has_same else ""
            moved_from = self.device.description.id
            log.warning("job.moved", extra={"job_id": job.id, "caller": job.owner, "device": moved_from})
            job.begin_anew(Restarted(job.attempts + 1, moved_from, bits_may_differ=not has_same))
            self._backlog.requeue(scheduled)

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

    async def _set_aside(self, job: Job, error: Draining, *, is_counted: bool) -> None:
        """Leaves a job that ran, or waited for room to be counted, to the next process."""
        if is_counted:
            with suppress(StoreError):
                await self._store.unbegin(job)
        self._completion.set_aside(job, error)

    def _loop_ended(self, loop: asyncio.Task[None]) -> None:
        """Without it no job would run there, and nobody would notice."""
        if not loop.cancelled() and loop.exception() is not None:
            log.critical("dispatcher.ended", exc_info=loop.exception())
            self.give_up(DeviceLost("what gives it jobs has ended"))


def no_device_for(job: Job) -> DeviceLost:
    """Why a job ends although the process goes on."""
    return DeviceLost(f"the devices that compute the profile {job.plan.profile} are lost")
