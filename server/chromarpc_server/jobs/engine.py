"""The engine: the parts of a job's life, put together.

Lives on the event loop. Device threads, image encoder and store are executors with threads of their own;
nothing here waits for them without yielding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.devices import DeviceDescription, DeviceState
from chromarpc_server.domain.errors import ChromaError, DeviceError, StoreError
from chromarpc_server.domain.limits import JobRetention, RestartLimits
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.domain.store_facts import StoreFacts
from chromarpc_server.jobs.admission import Admission
from chromarpc_server.jobs.attempt import AttemptRecorder
from chromarpc_server.jobs.attendance import Attendance
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import Completion
from chromarpc_server.jobs.dispatcher import Dispatcher, Left
from chromarpc_server.jobs.encoding import ImageEncoder
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.fleet import Fleet, Preload
from chromarpc_server.jobs.housekeeping import keep_house
from chromarpc_server.jobs.job import AnyJob
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.jobs.recovery import Recovery, RecoveryRules
from chromarpc_server.jobs.redraw import Redraw, Redrawing
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.rows import StoreSize
from chromarpc_server.jobs.submission import Submission
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.device import Device, DeviceSource, DeviceStatus, merged
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.runtime.running_time import RunningTime


@dataclass(frozen=True)
class EngineRules:
    """What an operator decides about jobs."""

    max_queued_jobs: int
    """More are refused."""
    retention: JobRetention
    """How long jobs that ended are kept."""
    restarts: RestartLimits = RestartLimits()
    """What becomes of jobs that an earlier process, or their caller, left."""
    picture_records: bool = True
    """Whether images may carry what they were drawn with; they are stored as they are handed out, prompts in
    them."""


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing now."""

    queued_jobs: int
    running_jobs: int
    devices: tuple[DeviceStatus, ...]
    """In the order in which they joined, lost ones included."""
    stored: StoreSize = StoreSize(0, 0)
    """Jobs that ended and are kept."""

    @property
    def cache(self) -> CacheSnapshot:
        """What is resident on all devices that work together."""
        return merged([one.cache for one in self.devices if one.state is not DeviceState.LOST])


@dataclass(frozen=True)
class DeviceCalls:
    """Whom the engine tells of devices."""

    all_lost: Callable[[], None]
    """When nothing can be computed in this process any more."""
    available: Callable[[bool], None] = lambda _: None
    """When the first device is there, and when none is for the moment."""


class Engine:
    """Admits jobs, has devices run them, and keeps what becomes of them."""

    def __init__(
        self,
        devices: DeviceSource,
        running_time: RunningTime,
        *,
        model_files: ModelFiles,
        adapters: AdapterSources,
        store: JobStore,
        rules: EngineRules,
        calls: DeviceCalls,
        observers: Sequence[JobObserver] = (),
    ) -> None:
        """Puts everything together and starts nothing; see `start`.

        Args:
            devices: run jobs; closed by `drain`.
            running_time: started and closed here.
            model_files: where models lie.
            adapters: where adapters come from.
            store: keeps jobs; closed by `drain`.
            rules: what an operator decides.
            calls: whom to tell of devices.
            observers: are notified of every event of every job.
        """
        self._running_time = running_time
        self._model_files = model_files
        self._adapters = adapters
        self._store = store
        self._tasks = Tasks()
        self.jobs = JobRegistry(store, rules.retention, observers)
        self._completion = Completion(store, self.jobs, self._tasks)
        estimates = StepTimes()
        self._backlog = Backlog(
            adapters,
            store,
            self._completion,
            estimates,
            running_time,
            max_jobs=rules.max_queued_jobs,
        )
        self._attendance = Attendance(
            self._backlog,
            self._completion,
            store,
            self._tasks,
            running_time,
            reattach_s=rules.restarts.reattach_s,
        )
        self._admission = Admission(
            adapters, model_files, self.jobs, store, self._backlog, self._attendance, self._tasks
        )
        self._redrawing = Redrawing(self.jobs, store, self._admission)
        self._recovery = Recovery(
            adapters,
            model_files,
            self.jobs,
            store,
            self._backlog,
            self._completion,
            RecoveryRules(rules.restarts.max_attempts, rules.picture_records),
        )
        self._encoder = ImageEncoder()
        recorder = AttemptRecorder(store, self._completion, self._tasks, self._encoder, estimates, observers)

        def dispatcher_of(device: Device, on_lost: Callable[[Dispatcher, DeviceError], Left]) -> Dispatcher:
            return Dispatcher(
                device,
                self._backlog,
                recorder,
                self._completion,
                store,
                self._tasks,
                max_attempts=rules.restarts.max_attempts,
                on_lost=on_lost,
            )

        self._fleet = Fleet(
            devices,
            dispatcher_of,
            self._backlog,
            self._tasks,
            on_all_lost=calls.all_lost,
            on_available=calls.available,
        )
        self._housekeeper: asyncio.Task[None] | None = None
        self._is_started = False

    async def start(self) -> None:
        """Opens the devices and begins to take jobs, which wait until `begin`.

        Raises:
            ChromaError: a device cannot be used.
        """
        self._running_time.start()
        await self._fleet.open()
        self._housekeeper = asyncio.create_task(keep_house(self._completion, self._store), name="housekeeper")
        self._backlog.open()
        self._is_started = True

    async def recover(self, models: Mapping[str, ModelSpec]) -> int:
        """Takes over what an earlier process was to run, from `begin` on. Returns how many jobs.

        Args:
            models: those that are served, by id.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        return await self._recovery.recover(models)

    async def preload(self, spec: ModelSpec, profile: str, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Makes a model resident on every device before a job asks for it, warmed up for images of these sizes.

        Raises:
            WeightsMissing, WeightsInvalid, OutOfMemory: it cannot be loaded.
        """
        files = await asyncio.to_thread(self._model_files.require, spec)
        await self._fleet.preload(Preload(spec.id, files, profile, tuple(sizes)))

    def begin(self) -> None:
        """Begins to run jobs: once everything is preloaded, for a job has its device's thread to itself."""
        if not self._is_started:
            raise RuntimeError("begin before start")
        # Callers come back once the server is ready, so their time does not run while models are loaded.
        self._recovery.expect_callers(self._attendance.expect_back)
        self._fleet.start()

    @property
    def description(self) -> DeviceDescription | None:
        """The first device, once there is one."""
        devices = self._fleet.devices
        return devices[0].description if devices else None

    @property
    def is_available(self) -> bool:
        """Whether a device is there."""
        return self._fleet.is_available

    @property
    def unended_jobs(self) -> int:
        """That wait and run."""
        return self._backlog.waiting_jobs + self._backlog.running_jobs

    def missing_devices(self) -> str:
        """Why no device is there, in one sentence."""
        return self._fleet.missing()

    def status(self) -> EngineStatus:
        """What the engine is doing now; answers at once, on any thread."""
        return EngineStatus(
            self._backlog.waiting_jobs, self._backlog.running_jobs, self._fleet.devices, self._store.size
        )

    def store_facts(self) -> StoreFacts:
        """What is known of the store and its disk now; answers at once, on any thread."""
        return self._store.facts()

    async def submit(self, submission: Submission) -> tuple[AnyJob, bool]:
        """See `Admission.submit`."""
        return await self._admission.submit(submission)

    async def redraw(self, redraw: Redraw, serving: Serving) -> tuple[AnyJob, bool]:
        """See `Redrawing.redraw`."""
        return await self._redrawing.redraw(redraw, serving)

    def attach(self, job: AnyJob) -> None:
        """See `Attendance.attach`."""
        self._attendance.attach(job)

    def detach(self, job: AnyJob, cause: ChromaError) -> None:
        """See `Attendance.detach`."""
        self._attendance.detach(job, cause)

    def watch(self, job: AnyJob) -> None:
        """See `Attendance.watch`."""
        self._attendance.watch(job)

    def unwatch(self, job: AnyJob) -> None:
        """See `Attendance.unwatch`."""
        self._attendance.unwatch(job)

    async def cancel_for_good(self, job: AnyJob, *, when_unattended: bool = False) -> None:
        """See `Attendance.cancel_for_good`."""
        await self._attendance.cancel_for_good(job, when_unattended=when_unattended)

    async def drain(self, grace_s: float) -> None:
        """Takes no more jobs and lets those that run finish within `grace_s`.

        What did not end is left to the next process, or ended where the store does not outlive this one.
        """
        self._backlog.close()
        self._adapters.stop_hashing()
        self._backlog.leave_to_next_process()
        await self._recovery.stop()
        await self._fleet.finish_running(grace_s)
        self._completion.stop_waiting()
        await self._tasks.join()
        await self._fleet.stop()
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)
        with suppress(StoreError):
            await self._completion.store_unstored()
        await self._tasks.join()  # jobs that were cancelled in the last moment
        await self._store.close()
        self._running_time.close()
        self._fleet.close()
        self._encoder.close()

    def hurry(self) -> None:
        """Ends the grace of a drain."""
        self._fleet.stop_running()
