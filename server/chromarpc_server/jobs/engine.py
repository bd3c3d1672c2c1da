"""The engine's front door: admits plans, runs them one at a time, fills their logs, stores what becomes of them.

Lives on the event loop. The device thread, the image encoder and the store are executors of one thread each;
nothing here waits for them without yielding.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.errors import (
    ChromaError,
    DeviceError,
    DeviceLost,
    Draining,
    InternalError,
    JobCancelled,
    JobDeadlineExceeded,
    ModelNotFound,
    QueueFull,
    QueueTimeExceeded,
    QuotaExceeded,
    QuotaViolation,
    StoreUnavailable,
)
from chromarpc_server.domain.events import Accepted, Cancelled, Completed, Failed, Prepared, Queued, Step, Terminal
from chromarpc_server.domain.limits import Budgets, JobRetention, Patience, RestartLimits
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.absences import Absences, is_abandoned, not_back, stop_waiting
from chromarpc_server.jobs.encoding import encode_image, encode_preview, split_chunks
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.jobs.picture_record import PictureRecord, picture_record
from chromarpc_server.jobs.queue import JobQueue, Waiting
from chromarpc_server.jobs.recovery import (
    find_again,
    known_adapters,
    refuse_hopeless,
    require_same,
    restored_job,
    tell_again,
)
from chromarpc_server.jobs.registry import JobBook
from chromarpc_server.jobs.store.database import StoreSize
from chromarpc_server.jobs.store.job_store import JobStore, Unfinished
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.pipeline import (
    DeviceChoice,
    DeviceDescription,
    describe_device,
    select_device,
    translate_memory_error,
    used_memory_bytes,
)
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import CacheSnapshot, ModelCache
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.runtime.watchdog import DeviceWatch
from chromarpc_server.runtime.work import RenderedImage, RenderedPreview, Report, StageDone, Work, WorkDone
from chromarpc_server.runtime.worker import DeviceWorker

log = logging.getLogger(__name__)

_T = TypeVar("_T")

RETRY_AFTER_DRAIN_S = 5.0
HOUSEKEEPING_S = 30.0
RETRY_AFTER_UNSTORED_S = HOUSEKEEPING_S


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing now."""

    queued_jobs: int
    running_jobs: int
    cache: CacheSnapshot
    stored: StoreSize = StoreSize(0, 0)
    """Jobs that ended and are kept."""


class Engine:
    """Queue, device thread and model cache of one device."""

    def __init__(
        self,
        choice: DeviceChoice,
        *,
        model_files: ModelFiles,
        adapters: AdapterSources,
        max_queued_jobs: int,
        budgets: Budgets,
        on_device_lost: Callable[[], None],
        store: JobStore,
        retention: JobRetention,
        restarts: RestartLimits | None = None,
        store_prompts: bool = True,
        picture_records: bool = True,
        patience: Patience | None = None,
        observers: Sequence[JobObserver] = (),
    ) -> None:
        """Prepares everything and starts nothing; see `start`.

        Args:
            choice: the device.
            model_files: where models lie.
            adapters: where adapters come from.
            max_queued_jobs: more are refused.
            budgets: how much may be resident.
            on_device_lost: called when the process must be restarted.
            store: keeps jobs; closed by `drain`.
            retention: how long it keeps those that ended.
            restarts: what becomes of those that an earlier process, or their caller, left.
            store_prompts: whether a store on disk gets to see what prompts say.
            picture_records: whether pictures may carry what they were drawn with; they are stored as they are
                handed out, prompts in them.
            patience: how long the device may take.
            observers: are told of every event of every job.
        """
        self._observers = tuple(observers)
        self._watch = DeviceWatch(patience or Patience())
        self._store = store
        self._restarts = restarts or RestartLimits()
        self._absences = Absences(self._restarts.reattach_s, self.cancel)
        self._store_prompts = store_prompts
        self._picture_records = picture_records
        self.jobs = JobBook(store, retention)
        self._choice = choice
        self._model_files = model_files
        self._adapters = adapters
        self._max_queued_jobs = max_queued_jobs
        self._budgets = budgets
        self._on_device_lost = on_device_lost
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._image_thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")
        self._queue = JobQueue()
        self._fetching: list[Waiting] = []
        """Admitted jobs whose adapters are being downloaded."""
        self._entering: Counter[str] = Counter()
        """How many jobs of each caller are being stored before they are admitted."""
        self._unstored: list[Job] = []
        """Jobs that ended and whose end could not be stored yet."""
        self._arrived = asyncio.Event()
        self._running: Waiting | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        """What must be done before the engine ends."""
        self._looking: set[asyncio.Task[Any] | None] = set()
        """Those of them that look for a job's adapters, and have stored nothing of it yet."""
        self._left_behind: list[Job] = []
        """Resumed jobs whose callers may come back from `begin` on."""
        self._housekeeper: asyncio.Task[None] | None = None
        self._accepting = False
        self._device_failed = False
        self._snapshot = CacheSnapshot()
        self._step_times = StepTimes()
        self._dispatcher: asyncio.Task[None] | None = None
        self._worker: DeviceWorker | None = None
        self._description: DeviceDescription | None = None

    async def start(self) -> DeviceDescription:
        """Opens the device and begins to take jobs, which wait until `begin`.

        Raises:
            ChromaError: the device cannot be used.
        """
        loop = asyncio.get_running_loop()
        worker, description = await loop.run_in_executor(self._device_thread, self._open_device, loop)
        self._worker, self._description = worker, description
        self._housekeeper = asyncio.create_task(self._keep_house(), name="housekeeper")
        self._accepting = True
        return description

    async def resume(self, models: Mapping[str, ModelSpec]) -> int:
        """Takes over what an earlier process was told to run, from `begin` on. Returns how many jobs.

        Args:
            models: those that are served, by id.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        left = await self._store.take_over()
        for stored in left:
            job = restored_job(stored, picture_records=self._picture_records)
            self._observe(job)
            self.jobs.add(job)
            tell_again(job, stored.starts)
            log.info("job.resumed", extra={"job_id": job.id, "caller": job.owner, "attempts_before": job.attempts})
            try:
                await self._readmit(job, stored, models)
            except ChromaError as error:
                self._end_early(job, error)
            except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
                self._end_early(job, self._unforeseen(job, error))
        return len(left)

    async def _readmit(self, job: Job, stored: Unfinished, models: Mapping[str, ModelSpec]) -> None:
        refuse_hopeless(stored, self._restarts.max_attempts)
        spec = models.get(job.plan.served_model)
        if spec is None:
            raise ModelNotFound(f"the server was restarted, and serves no model {job.plan.served_model}")
        found = await find_again(stored, self._adapters)
        files = await asyncio.to_thread(self._model_files.require, spec)
        job.adapter_files = found.complete
        if not job.plan.detached:
            self._left_behind.append(job)
        # One that was running has waited its time already, and is to be run again.
        self._set_going(Waiting(job, files, found), hf_token=None, may_expire=not stored.was_begun)

    async def preload(self, spec: ModelSpec, profile: str, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Makes a model resident before any request asks for it, warmed up for pictures of these sizes.

        Raises:
            WeightsMissing, WeightsInvalid, OutOfMemory: it cannot be loaded.
        """
        if self._worker is None:
            raise RuntimeError("preload before start")
        files = await asyncio.to_thread(self._model_files.require, spec)
        loop = asyncio.get_running_loop()
        load = partial(self._worker.load, spec.id, files, profile, sizes)
        await self._watch.guard(loop.run_in_executor(self._device_thread, load))

    def begin(self) -> None:
        """Begins to run jobs: once everything is preloaded, for a job has the device's thread to itself."""
        if self._worker is None:
            raise RuntimeError("begin before start")
        # Callers come back once the server is ready, so their time does not run while models are loaded.
        for job in self._left_behind:
            if job.attached <= 0 and job.watchers <= 0 and not job.log.sealed:
                self._absences.begin(job)
        self._left_behind.clear()
        self._dispatcher = asyncio.create_task(self._dispatch(self._worker), name="dispatcher")
        self._dispatcher.add_done_callback(self._dispatcher_ended)

    @property
    def description(self) -> DeviceDescription:
        """The device, once started."""
        if self._description is None:
            raise RuntimeError("the engine was not started")
        return self._description

    def status(self) -> EngineStatus:
        """What the engine is doing now; answers at once."""
        return EngineStatus(
            len(self._queue) + len(self._fetching),
            int(self._running is not None),
            self._snapshot,
            self._store.size,
        )

    def memory_used_bytes(self) -> int:
        """What the process holds of the device's memory now, of the host's on a CPU."""
        return used_memory_bytes(self._choice.device)

    async def submit(
        self,
        plan: Plan,
        spec: ModelSpec,
        *,
        deadline_s: float | None,
        hf_token: str | None = None,
        caller: Caller = NOBODY,
        fingerprint: str = "",
    ) -> tuple[AnyJob, bool]:
        """Admits a plan as a job, whose log then fills by itself, or finds the one that the same request made.

        Args:
            plan: what to run.
            spec: the model that computes (`plan.served_model`).
            deadline_s: seconds from now after which the caller stops waiting.
            hf_token: for adapters that are fetched from Hugging Face; forgotten once they are.
            caller: whose job it is.
            fingerprint: of the request, to tell the same one from another under the plan's request id.

        Returns:
            The job, and whether it was there already.

        Raises:
            RequestIdReused: another request was made under the plan's request id.
            LoraNotFound: an adapter is not below the adapter root.
            InvalidParameter: an adapter is a URL, and this server fetches none.
            WeightsMissing: the model's files are not on this machine.
            QuotaExceeded: the caller has as many jobs waiting as it may, or may not have one of this size.
            QueueFull, Draining, StoreUnavailable: no job is taken now.
        """
        submitting = self._track(self._submit(plan, spec, deadline_s, hf_token, caller, fingerprint))
        try:
            # Stored or not, but never half: the caller may go away meanwhile.
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(self._abandoned)
            if submitting in self._looking:
                submitting.cancel()
            raise

    def _abandoned(self, submitting: asyncio.Task[tuple[AnyJob, bool]]) -> None:
        """The caller went away before it was told of its job."""
        if submitting.cancelled() or submitting.exception() is not None:
            return
        job, existed = submitting.result()
        if isinstance(job, Job) and not existed and not job.attached:
            self._leave(job, JobCancelled("the caller cancelled or went away"))

    async def _submit(
        self,
        plan: Plan,
        spec: ModelSpec,
        deadline_s: float | None,
        hf_token: str | None,
        caller: Caller,
        fingerprint: str,
    ) -> tuple[AnyJob, bool]:
        async with self.jobs.creating(caller.name, plan.request_id):
            known = await self.jobs.existing(caller.name, plan.request_id, fingerprint)
            if known is not None and not await self._forget_abandoned(known):
                await self._join(known, plan, deadline_s)
                return known, True
            return await self._admit(plan, spec, deadline_s, hf_token, caller, fingerprint), False

    async def _join(self, known: AnyJob, plan: Plan, deadline_s: float | None) -> None:
        """One more caller counts on a job, which the earlier ones' deadlines and leaving may not end any more."""
        if not isinstance(known, Job):
            return
        self._absences.renew(known)
        known.cancellation.wait_longer(None if deadline_s is None else time.monotonic() + deadline_s)
        if plan.detached and not known.plan.detached:
            before = known.plan
            known.plan = replace(before, detached=True)
            try:
                await self._store.note_detached(known)
            except StoreUnavailable:
                known.plan = before
                raise
            stop_waiting(known)

    async def _forget_abandoned(self, known: AnyJob) -> bool:
        """Whether a job ended only because its caller did not come back; its request id is then free again."""
        if not is_abandoned(known):
            return False
        async for _ in known.log.follow(known.log.last_sequence):  # at most a step, where it still runs
            pass
        if not is_abandoned(known):
            return False
        await self._store.release_request_id(known)
        return True

    async def _admit(
        self,
        plan: Plan,
        spec: ModelSpec,
        deadline_s: float | None,
        hf_token: str | None,
        caller: Caller,
        fingerprint: str,
    ) -> Job:
        _refuse_size(plan, caller)
        self._refuse_if_closed(caller)
        deadline_at = None if deadline_s is None else time.monotonic() + deadline_s
        looking = asyncio.current_task()
        self._looking.add(looking)
        try:
            found = await self._adapters.find(plan.loras, caller.name)
        finally:
            self._looking.discard(looking)
        files = await asyncio.to_thread(self._model_files.require, spec)
        self._refuse_if_closed(caller)
        job = Job(plan, found.complete, Cancellation(deadline_at), owner=caller.name, fingerprint=fingerprint)
        self._observe(job)
        self._entering[caller.name] += 1
        try:
            await self._store.insert(
                job,
                with_prompts=self._store_prompts or not self._store.is_durable,
                needs_token=hf_token is not None and None in found.files,
                adapters=[None if file is None else KnownAdapter.of(file) for file in found.files],
            )
        finally:
            self._entering[caller.name] -= 1
        self.jobs.add(job)
        job.log.append(Accepted(job.id, plan))
        log.info(
            "job.accepted",
            extra={
                "job_id": job.id,
                "caller": job.owner,
                "model": plan.served_model,
                "profile": plan.profile,
                "images": len(plan.prompts),
                "adapters": len(plan.loras),
                "pixel_steps": plan.pixel_steps,
            },
        )
        self._set_going(Waiting(job, files, found), hf_token)
        return job

    def _observe(self, job: Job) -> None:
        for observer in self._observers:
            job.log.observe(partial(observer.on_event, job), observer.on_read)

    def _set_going(self, waiting: Waiting, hf_token: str | None, *, may_expire: bool = True) -> None:
        """Puts a job that is stored into the queue, once its adapters are here."""
        job = waiting.job
        if not self._accepting:
            self._stop_waiting(waiting)
            return
        if job.plan.max_queue_s is not None and may_expire:
            waited_s = time.monotonic() - job.admitted_at
            loop = asyncio.get_running_loop()
            job.expiry = loop.call_later(job.plan.max_queue_s - waited_s, self._expire, job)
        if None in waiting.adapters.files:
            self._fetching.append(waiting)
            waiting.fetching = asyncio.create_task(self._fetch(waiting, hf_token))
        else:
            self._enqueue(waiting)

    def _track(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep_house(self) -> None:
        """Stores what could not be stored, and forgets what need not be kept longer."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                await self._settle()
                await self._store.sweep()
            except StoreUnavailable:
                pass  # told already; there is a next time
            except Exception:
                log.exception("housekeeping.failed")

    async def _settle(self) -> None:
        while self._unstored:
            job = self._unstored[0]
            if job.log.ending is not None:
                await self._store.finish(job, job.log.ending)
            self._unstored.remove(job)
            self.jobs.ended(job)

    def _expire(self, job: Job) -> None:
        """Ends a job that waited too long; one that runs or ended is left alone."""
        if job.started_at is None and not job.log.sealed:
            seconds = job.plan.max_queue_s
            self.cancel(
                job, QueueTimeExceeded(f"the job waited longer than {seconds:g} s", field="max_queue_time")
            )

    def attach(self, job: AnyJob) -> None:
        """Somebody holds on to a job from now on, until `detach`."""
        if isinstance(job, Job):
            job.attached += 1
            job.is_left = False
            stop_waiting(job)

    def detach(self, job: AnyJob, cause: ChromaError) -> None:
        """Somebody who held on to a job let go; unless it may go on alone, or wait, the last one ends it."""
        if isinstance(job, Job):
            job.attached -= 1
            if job.attached <= 0:
                self._leave(job, cause)

    def watch(self, job: AnyJob) -> None:
        """Somebody looks at a job from now on, until `unwatch`, and has come back to it if nobody else has."""
        if isinstance(job, Job):
            job.watchers += 1
            stop_waiting(job)

    def unwatch(self, job: AnyJob) -> None:
        """Somebody looks at a job no more."""
        if isinstance(job, Job):
            job.watchers -= 1
            if job.watchers <= 0 and job.attached <= 0 and job.plan.may_return:
                self._leave(job, JobCancelled("the caller cancelled or went away"))

    def _leave(self, job: Job, cause: ChromaError) -> None:
        """Nobody holds on to a job any more."""
        if job.plan.detached or job.log.sealed or job.log.suspended:
            return
        if not (job.plan.may_return and isinstance(cause, JobCancelled)):
            self.cancel(job, cause)
        elif job.watchers <= 0:
            if job.is_left:
                self._track(self._cancel_left(job))
            else:
                self._absences.begin(job)

    async def cancel_for_good(self, job: AnyJob, *, when_unattended: bool = False) -> None:
        """Stops a job as `cancel` does, and lets no later process go on with it. Returns once that is stored.

        Args:
            job: the job.
            when_unattended: leave it to those who hold on to it or watch it; the last one who goes ends it.
                One that goes on without callers is left alone.

        Raises:
            StoreUnavailable, Draining: it is not stored; this process has stopped the job all the same.
        """
        if not isinstance(job, Job) or (when_unattended and job.plan.detached):
            return
        if when_unattended and (job.attached > 0 or job.watchers > 0):
            job.is_left = True
        else:
            cause = not_back("its caller left") if when_unattended else JobCancelled("the job was cancelled")
            # Whole, although the caller may go away meanwhile.
            await asyncio.shield(self._track(self._cancel_for_good(job, cause)))

    async def _cancel_left(self, job: Job) -> None:
        with suppress(StoreUnavailable, Draining):  # stopped all the same, and nobody was told anything
            await self._cancel_for_good(job, not_back("its caller left"))

    async def _cancel_for_good(self, job: Job, cause: JobCancelled) -> None:
        is_noted = False
        if not job.log.sealed:
            job.cancelled = job.cancelled or cause
            self.cancel(job, cause)
        if not job.log.sealed and self._store.is_durable:
            await self._store.note_cancelled(job)
            is_noted = True
        if job.log.suspended and job.cancelled is not None:
            self._end_early(job, job.cancelled)
        await self._settled(job)
        if not is_noted and job in self._unstored:
            raise StoreUnavailable("the job's end cannot be stored now", retry_after_s=RETRY_AFTER_UNSTORED_S)

    def cancel(self, job: AnyJob, cause: ChromaError) -> None:
        """Stops a job: at once while it waits, within one step while it runs, not at all once it ended."""
        if not isinstance(job, Job) or job.log.sealed:
            return
        job.cancellation.cancel(cause)
        for waiting in self._fetching:
            if waiting.job is job and waiting.fetching is not None:
                waiting.fetching.cancel()
                self._end_early(job, cause)
                return
        for waiting in self._queue:
            if waiting.job is job:
                self._queue.remove(waiting)
                waiting.adapters.release()
                self._end_early(job, cause)
                self._tell_positions()
                return

    async def _settled(self, job: Job) -> None:
        """Returns once an end that is decided is stored, and so can be seen."""
        if job.log.sealed and not job.log.closed:
            async for _ in job.log.follow(job.log.last_sequence):
                pass

    async def drain(self, grace_s: float) -> None:
        """Takes no more jobs and lets the running one finish within `grace_s`.

        What did not end is left to the next process, or ended where the store does not outlive this one.
        """
        self._accepting = False
        self._adapters.stop_hashing()
        for waiting in (*self._fetching, *self._queue):
            if waiting.fetching is not None and not waiting.fetching.done():
                waiting.fetching.cancel()
            else:
                self._queue.remove(waiting)
                waiting.adapters.release()
            self._stop_waiting(waiting)
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            if self._running is not None:
                log.warning("job.grace_over", extra={"job_id": self._running.job.id, "grace_s": grace_s})
                self._running.job.cancellation.cancel(_stopping())
            await self._idle.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)
        loops = [task for task in (self._dispatcher, self._housekeeper) if task is not None]
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        with suppress(StoreUnavailable):
            await self._settle()
        while self._tasks:  # jobs that were cancelled in the last moment
            await asyncio.wait(self._tasks)
        await self._store.close()
        self._device_thread.shutdown(wait=False)
        self._image_thread.shutdown(wait=False)

    def hurry(self) -> None:
        """Ends the grace of a drain."""
        if self._running is not None:
            self._running.job.cancellation.cancel(_stopping())

    def _stop_waiting(self, waiting: Waiting) -> None:
        """Leaves a job that waits to the next process, or ends it."""
        if self._store.is_durable:
            waiting.job.log.suspend(_stopping())
        else:
            self._end_early(waiting.job, _stopping())

    async def _fetch(self, waiting: Waiting, hf_token: str | None) -> None:
        """Downloads a job's adapters; then it joins the queue."""
        job = waiting.job
        try:
            waiting.adapters = await self._adapters.fetch(
                job.plan.loras, waiting.adapters, token=hf_token, emit=job.log.append, owner=job.owner
            )
            job.adapter_files = waiting.adapters.complete
            await self._note_fetched(waiting)
        except ChromaError as error:
            self._end_early(job, error)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._end_early(job, self._unforeseen(job, error))
        except asyncio.CancelledError:
            waiting.adapters.release()
            raise
        finally:
            self._fetching.remove(waiting)
        if job.log.sealed:
            waiting.adapters.release()
        elif not self._accepting:
            waiting.adapters.release()
            self._stop_waiting(waiting)
        else:
            self._enqueue(waiting)

    async def _note_fetched(self, waiting: Waiting) -> None:
        """What was fetched with a token need not be fetched again after a restart."""
        job = waiting.job
        fetched = iter(waiting.adapters.downloads)
        hashes = [next(fetched).sha256 if lora.is_url else None for lora in job.plan.loras]
        with suppress(StoreUnavailable):
            await self._store.note_adapters(job, known_adapters(job, hashes))

    def _enqueue(self, waiting: Waiting) -> None:
        self._queue.add(waiting)
        self._tell_positions()
        self._arrived.set()

    def _refuse_if_closed(self, caller: Caller) -> None:
        if not self._accepting:
            raise Draining("the server is starting or stopping", retry_after_s=RETRY_AFTER_DRAIN_S)
        count = len(self._queue) + len(self._fetching) + self._entering.total()
        wait_s = self._wait_for(list(self._queue))
        retry_after_s = max(1.0, wait_s / len(self._queue)) if wait_s and self._queue else 5.0
        if count >= self._max_queued_jobs:
            message = f"{count} jobs are waiting already, and no more may"
            raise QueueFull(
                message,
                retry_after_s=retry_after_s,
                quota=QuotaViolation("server", "max_queued_jobs", self._max_queued_jobs, message),
            )
        own = sum(waiting.job.owner == caller.name for waiting in (*self._queue, *self._fetching))
        own += self._entering[caller.name]
        if own >= caller.limits.max_queued_jobs:
            raise QuotaExceeded.of(
                "caller",
                "max_queued_jobs",
                caller.limits.max_queued_jobs,
                f"{own} of your jobs are waiting already, and no more may",
                retry_after_s=retry_after_s,
            )

    def _open_device(self, loop: asyncio.AbstractEventLoop) -> tuple[DeviceWorker, DeviceDescription]:
        try:
            # The first thing that the device's thread does; whatever names no device there means this one.
            select_device(self._choice.device)
            description = describe_device(self._choice)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            lost = DeviceLost(f"{self._choice.device} cannot be used: {why}")
            raise translate_memory_error(error) or lost from None

        def publish(snapshot: CacheSnapshot) -> None:
            loop.call_soon_threadsafe(self._take_snapshot, snapshot)

        cache = ModelCache(self._choice, self._budgets, publish=publish)
        return DeviceWorker(self._choice, description, cache, self._watch), description

    def _take_snapshot(self, snapshot: CacheSnapshot) -> None:
        self._snapshot = snapshot

    def _fail_device(self) -> None:
        """Nothing can be computed in this process any more."""
        self._accepting = False
        self._device_failed = True
        self._on_device_lost()

    def _dispatcher_ended(self, dispatcher: asyncio.Task[None]) -> None:
        """Without it no job would run, and nobody would be told."""
        if not dispatcher.cancelled() and dispatcher.exception() is not None:
            log.critical("dispatcher.ended", exc_info=dispatcher.exception())
            self._fail_device()

    async def _dispatch(self, worker: DeviceWorker) -> None:
        while not self._device_failed:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            waiting = self._queue.take(self._snapshot.holds)
            self._running = waiting
            self._idle.clear()
            self._tell_positions()
            try:
                await self._run(worker, waiting)
            finally:
                waiting.adapters.release()
                self._running = None
                self._idle.set()
                # An idle server holds on to no job's pictures.
                del waiting

    async def _run(self, worker: DeviceWorker, waiting: Waiting) -> None:
        loop = asyncio.get_running_loop()
        job = waiting.job
        job.started_at = time.monotonic()
        job.started = datetime.now(UTC)
        _stop_expiry(job)
        job.attempts += 1

        def emit(report: Report) -> None:
            loop.call_soon_threadsafe(self._take, waiting, report)

        try:
            # Counted before it is made: a job that takes the process down with it must not do so for ever.
            await self._store.begin(job)
            work = Work(job.id, job.plan, waiting.files, job.adapter_files, job.cancellation, emit)
            done = await self._watch.guard(loop.run_in_executor(self._device_thread, worker.run, work))
        except ChromaError as error:
            if not isinstance(error, Draining | DeviceError):
                self._end_early(job, error)
            elif job.cancelled is not None or not self._store.is_durable:
                self._end_early(job, job.cancelled or error)
            else:
                await self._set_aside(job, error)
            if isinstance(error, DeviceError):
                self._fail_device()
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._end_early(job, self._unforeseen(job, error))
        else:
            # The next job starts while this one's last image is still being encoded.
            self._track(self._finish(waiting, done))

    async def _set_aside(self, job: Job, error: Draining | DeviceError) -> None:
        """Leaves a job that ran to the next process."""
        if isinstance(error, Draining):
            with suppress(StoreUnavailable):
                await self._store.unbegin(job)
        if job.cancelled is not None:  # meanwhile
            self._end_early(job, job.cancelled)
            return
        log.warning("job.set_aside", extra={"job_id": job.id, "caller": job.owner, "reason": error.reason})
        job.log.suspend(error)

    def _take(self, waiting: Waiting, report: Report) -> None:
        job = waiting.job
        match report:
            case RenderedImage() | RenderedPreview():
                task = self._track(self._encode(waiting, report))
                job.encodings.add(task)
                task.add_done_callback(job.encodings.discard)
            case StageDone():
                for observer in self._observers:
                    observer.on_stage(job, report)
            case Prepared():
                waiting.prepared = report
                job.log.append(report)
                changed = require_same(job, report.adapters)
                if changed is not None:
                    job.cancellation.cancel(changed)
                elif report.adapters and self._store.is_durable:
                    self._track(self._note_hashes(job, [adapter.sha256 for adapter in report.adapters]))
            case Step():
                prompt = job.plan.prompts[report.prompt_index]
                pixels = prompt.width * prompt.height
                job.pixel_steps_done += pixels
                job.done_steps += 1
                self._step_times.observe(job.plan.served_model, job.plan.profile, pixels, report.duration_s)
                job.log.append(report)
            case _:
                job.log.append(report)

    async def _note_hashes(self, job: Job, hashes: Sequence[str]) -> None:
        with suppress(StoreUnavailable):
            await self._store.note_adapters(job, known_adapters(job, hashes))

    async def _encode(self, waiting: Waiting, report: RenderedImage | RenderedPreview) -> None:
        loop = asyncio.get_running_loop()
        job = waiting.job
        started = time.monotonic()
        try:
            if isinstance(report, RenderedPreview):
                job.log.append(await loop.run_in_executor(self._image_thread, encode_preview, report))
                return
            record = self._record(waiting, report.prompt_index)
            encode = partial(encode_image, report, job.plan.output, record)
            header, data = await loop.run_in_executor(self._image_thread, encode)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            failure = translate_memory_error(error) or self._unforeseen(job, error)
            job.cancellation.cancel(failure)
            self._end_early(job, failure)
            return
        waiting.image_encoding_s += time.monotonic() - started
        if job.log.sealed:
            return
        waiting.images += 1
        job.log.append(header)
        for chunk in split_chunks(report.prompt_index, data):
            job.log.append(chunk)
        try:
            await self._store.put_image(header, data)
        except StoreUnavailable as error:
            waiting.unstored = error

    def _record(self, waiting: Waiting, prompt_index: int) -> PictureRecord | None:
        """What a picture is to carry; None for nothing."""
        plan, prepared = waiting.job.plan, waiting.prepared
        if prepared is None or not plan.output.picture_record:
            return None
        return picture_record(plan, prompt_index, prepared, device_dtype=self.description.dtype)

    async def _finish(self, waiting: Waiting, done: WorkDone) -> None:
        job = waiting.job
        # The device thread's reports were scheduled before its return, so every encoding has begun by now.
        while job.encodings:
            await asyncio.wait(job.encodings)
        if waiting.unstored is not None:
            self._end_early(job, waiting.unstored)
            return
        now = time.monotonic()
        started_at = job.started_at if job.started_at is not None else now
        timings = replace(
            done.timings,
            queued_s=started_at - job.admitted_at,
            image_encoding_s=waiting.image_encoding_s,
            total_s=now - job.admitted_at,
        )
        self._conclude(
            job,
            Completed(timings, done.peak_memory_bytes, waiting.images),
            {"images": waiting.images, **_rounded(timings)},
        )

    def _end_early(self, job: Job, error: ChromaError) -> None:
        fields: dict[str, object] = {"reason": error.reason}
        if job.cancellation.requested_at is not None:
            fields["freed_after_ms"] = round(1000 * (time.monotonic() - job.cancellation.requested_at), 1)
        if job.started_at is not None:
            fields["ran_s"] = round(time.monotonic() - job.started_at, 3)
        is_cancelled = isinstance(error, JobCancelled | JobDeadlineExceeded)
        self._conclude(job, Cancelled(error) if is_cancelled else Failed(error), fields)

    def _conclude(self, job: Job, event: Terminal, fields: Mapping[str, object]) -> None:
        """Decides on a job's end, which readers see once it is stored. The first decision stands."""
        if not job.log.sealed:
            _stop_timers(job)
            job.log.seal(event)
            self._track(self._commit(job, event, fields))

    async def _commit(self, job: Job, event: Terminal, fields: Mapping[str, object]) -> None:
        while job.encodings:
            await asyncio.wait(job.encodings)
        try:
            await self._store.finish(job, job.log.seal(event))
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has to end
            reason = error if isinstance(error, StoreUnavailable) else self._unforeseen(job, error)
            if isinstance(event, Completed):
                event, fields = Failed(reason), {"reason": reason.reason}
            try:
                await self._store.finish(job, job.log.seal(event))
            except Exception as again:  # noqa: BLE001 - watchers wait for the end, stored or not
                if not isinstance(again, StoreUnavailable):
                    self._unforeseen(job, again)
                self._unstored.append(job)
        job.log.close()
        if job not in self._unstored:
            self.jobs.ended(job)
        level = logging.WARNING if isinstance(event, Failed) else logging.INFO
        log.log(level, _LOG_NAMES[type(event)], extra={"job_id": job.id, "caller": job.owner, **fields})

    def _unforeseen(self, job: Job, error: Exception) -> InternalError:
        error_id = uuid.uuid4().hex[:12]
        log.error(
            "job.internal_error",
            exc_info=error,
            extra={"job_id": job.id, "caller": job.owner, "error_id": error_id},
        )
        return InternalError(f"internal error {error_id}", metadata={"error_id": error_id})

    def _tell_positions(self) -> None:
        wait_s = self._wait_for([])
        for position, waiting in enumerate(self._queue, 1):
            if waiting.job.position != position:
                waiting.job.position = position
                waiting.job.log.append(Queued(position, wait_s))
            own_s = self._left_s(waiting.job)
            wait_s = None if wait_s is None or own_s is None else wait_s + own_s

    def _wait_for(self, ahead: Sequence[Waiting]) -> float | None:
        """Seconds until the running job and those `ahead` are done; None while nothing was measured."""
        total = 0.0
        for waiting in (*([self._running] if self._running is not None else []), *ahead):
            estimate = self._left_s(waiting.job)
            if estimate is None:
                return None
            total += estimate
        return total

    def _left_s(self, job: Job) -> float | None:
        """Seconds that a job will still take; None while nothing was measured."""
        left = job.plan.pixel_steps - job.pixel_steps_done
        return self._step_times.estimate_s(job.plan.served_model, job.plan.profile, left)


_LOG_NAMES: Mapping[type[Terminal], str] = {
    Completed: "job.completed",
    Failed: "job.failed",
    Cancelled: "job.cancelled",
}


def _stop_timers(job: Job) -> None:
    """A timer that is not needed any more would hold what the job weighs."""
    _stop_expiry(job)
    stop_waiting(job)


def _stop_expiry(job: Job) -> None:
    if job.expiry is not None:
        job.expiry.cancel()
        job.expiry = None


def _stopping() -> Draining:
    return Draining("the server is stopping", retry_after_s=RETRY_AFTER_DRAIN_S)


def _refuse_size(plan: Plan, caller: Caller) -> None:
    limit = caller.limits.max_pixel_steps
    if plan.pixel_steps > limit:
        raise QuotaExceeded.of(
            "caller",
            "max_pixel_steps",
            limit,
            f"width × height × steps come to {plan.pixel_steps}, and you may ask for {limit} at once",
        )


def _rounded(timings: object) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in vars(timings).items()}
