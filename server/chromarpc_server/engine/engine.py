"""The engine's front door: admits plans, runs them one at a time, fills their logs.

Lives on the event loop. The device thread and the image encoder are executors of one thread each; nothing here
waits for them without yielding.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.errors import (
    ChromaError,
    DeviceLost,
    Draining,
    InternalError,
    JobCancelled,
    JobDeadlineExceeded,
    QueueFull,
    QueueTimeExceeded,
    QuotaExceeded,
    QuotaViolation,
)
from chromarpc_server.domain.events import Accepted, Cancelled, Completed, Failed, Queued, Step
from chromarpc_server.domain.limits import Budgets, JobRetention
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import Plan
from chromarpc_server.engine.adapter_sources import AdapterSources, FoundAdapters
from chromarpc_server.engine.images import (
    RenderedImage,
    RenderedPreview,
    encode_image,
    encode_preview,
    split_chunks,
)
from chromarpc_server.engine.job import Cancellation, Job
from chromarpc_server.engine.job_book import JobBook
from chromarpc_server.engine.job_log import JobLog
from chromarpc_server.engine.job_observer import JobObserver, StageDone
from chromarpc_server.engine.model_cache import CacheSnapshot, ModelCache
from chromarpc_server.engine.model_files import ModelFiles
from chromarpc_server.engine.step_times import StepTimes
from chromarpc_server.engine.worker import DeviceWorker, Report, WorkDone
from chromarpc_server.pipeline import (
    CheckpointFiles,
    DeviceChoice,
    DeviceDescription,
    describe_device,
    used_memory_bytes,
)

log = logging.getLogger(__name__)

RETRY_AFTER_DRAIN_S = 5.0
MAX_OVERTAKEN = 4
"""How many later jobs may run before a waiting one because their weights are resident."""


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing now."""

    queued_jobs: int
    running_jobs: int
    cache: CacheSnapshot


@dataclass
class _Waiting:
    """A job in the queue, with what its run needs."""

    job: Job
    files: CheckpointFiles
    adapters: FoundAdapters
    fetching: asyncio.Task[None] | None = None
    """Its downloads; it joins the queue once they are done."""
    image_encoding_s: float = 0.0
    images: int = 0
    encodings: set[asyncio.Task[None]] = field(default_factory=set)


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
        retention: JobRetention | None = None,
        observers: Sequence[JobObserver] = (),
    ) -> None:
        """Prepares everything and starts nothing; see `start`.

        `observers` are told of every event of every job.
        """
        self._observers = tuple(observers)
        self.jobs = JobBook(retention or JobRetention())
        self._choice = choice
        self._model_files = model_files
        self._adapters = adapters
        self._max_queued_jobs = max_queued_jobs
        self._budgets = budgets
        self._on_device_lost = on_device_lost
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._image_thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")
        self._queue: deque[_Waiting] = deque()
        self._fetching: list[_Waiting] = []
        """Admitted jobs whose adapters are being downloaded."""
        self._arrived = asyncio.Event()
        self._running: _Waiting | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._accepting = False
        self._snapshot = CacheSnapshot()
        self._step_times = StepTimes()
        self._dispatcher: asyncio.Task[None] | None = None
        self._worker: DeviceWorker | None = None
        self._description: DeviceDescription | None = None

    async def start(self) -> DeviceDescription:
        """Opens the device and begins to take jobs.

        Raises:
            ChromaError: the device cannot be used.
        """
        loop = asyncio.get_running_loop()
        worker, description = await loop.run_in_executor(self._device_thread, self._open_device, loop)
        self._worker, self._description = worker, description
        self._dispatcher = asyncio.create_task(self._dispatch(worker), name="dispatcher")
        self._accepting = True
        return description

    async def preload(self, spec: ModelSpec, profile: str, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Makes a model resident before any request asks for it, warmed up for pictures of these sizes.

        Raises:
            WeightsMissing, WeightsInvalid, OutOfMemory: it cannot be loaded.
        """
        if self._worker is None:
            raise RuntimeError("preload before start")
        files = await asyncio.to_thread(self._model_files.require, spec)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._device_thread, self._worker.load, spec.id, files, profile, sizes)

    @property
    def description(self) -> DeviceDescription:
        """The device, once started."""
        if self._description is None:
            raise RuntimeError("the engine was not started")
        return self._description

    def status(self) -> EngineStatus:
        """What the engine is doing now; answers at once."""
        return EngineStatus(len(self._queue) + len(self._fetching), int(self._running is not None), self._snapshot)

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
    ) -> tuple[Job, bool]:
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
            QueueFull, Draining: no job is taken now.
        """
        async with self.jobs.creating(caller.name, plan.request_id):
            known = self.jobs.existing(caller.name, plan.request_id, fingerprint)
            if known is not None:
                return known, True
            return await self._admit(plan, spec, deadline_s, hf_token, caller, fingerprint), False

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
        found = await self._adapters.find(plan.loras, caller.name)
        files = await asyncio.to_thread(self._model_files.require, spec)
        self._refuse_if_closed(caller)
        deadline_at = None if deadline_s is None else time.monotonic() + deadline_s
        job = Job(plan, found.complete, Cancellation(deadline_at), owner=caller.name, fingerprint=fingerprint)
        job.log = JobLog(lambda: self._ended(job))
        for observer in self._observers:
            job.log.observe(partial(observer.on_event, job), observer.on_read)
        job.log.append(Accepted(job.id, plan))
        self.jobs.add(job)
        if plan.max_queue_s is not None:
            asyncio.get_running_loop().call_later(plan.max_queue_s, self._expire, job)
        waiting = _Waiting(job, files, found)
        if None in found.files:
            self._fetching.append(waiting)
            waiting.fetching = asyncio.create_task(self._fetch(waiting, hf_token))
        else:
            self._enqueue(waiting)
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
        return job

    def _ended(self, job: Job) -> None:
        job.ended_at = time.monotonic()
        self.jobs.sweep()

    def _expire(self, job: Job) -> None:
        """Ends a job that waited too long; one that runs or ended is left alone."""
        if job.started_at is None and not job.log.closed:
            seconds = job.plan.max_queue_s
            self.cancel(
                job, QueueTimeExceeded(f"the job waited longer than {seconds:g} s", field="max_queue_time")
            )

    def detach(self, job: Job, cause: ChromaError) -> None:
        """Somebody who held on to a job let go; unless it may go on alone, the last one ends it."""
        job.attached -= 1
        if job.attached <= 0 and not job.plan.detached:
            self.cancel(job, cause)

    def cancel(self, job: Job, cause: ChromaError) -> None:
        """Stops a job: at once while it waits, within one step while it runs, not at all once it ended."""
        if job.log.closed:
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

    async def drain(self, grace_s: float) -> None:
        """Takes no more jobs, lets the running one finish within `grace_s`, ends the others."""
        self._accepting = False
        stopping = Draining("the server is stopping", retry_after_s=RETRY_AFTER_DRAIN_S)
        for waiting in self._fetching:
            self._end_early(waiting.job, stopping)
            if waiting.fetching is not None:
                waiting.fetching.cancel()
        while self._queue:
            waiting = self._queue.popleft()
            waiting.adapters.release()
            self._end_early(waiting.job, stopping)
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            if self._running is not None:
                log.warning("job.grace_over", extra={"job_id": self._running.job.id, "grace_s": grace_s})
                self._running.job.cancellation.cancel(stopping)
            await self._idle.wait()
        if self._finishing:
            await asyncio.wait(self._finishing)
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        self._device_thread.shutdown(wait=False)
        self._image_thread.shutdown(wait=False)

    async def _fetch(self, waiting: _Waiting, hf_token: str | None) -> None:
        """Downloads a job's adapters; then it joins the queue."""
        job = waiting.job
        try:
            waiting.adapters = await self._adapters.fetch(
                job.plan.loras, waiting.adapters, token=hf_token, emit=job.log.append, owner=job.owner
            )
        except ChromaError as error:
            self._end_early(job, error)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._end_early(job, self._unforeseen(job, error))
        finally:
            self._fetching.remove(waiting)
        if job.log.closed:
            waiting.adapters.release()
            return
        job.adapter_files = waiting.adapters.complete
        self._enqueue(waiting)

    def _enqueue(self, waiting: _Waiting) -> None:
        self._queue.append(waiting)
        self._tell_positions()
        self._arrived.set()

    def _refuse_if_closed(self, caller: Caller) -> None:
        if not self._accepting:
            raise Draining("the server is starting or stopping", retry_after_s=RETRY_AFTER_DRAIN_S)
        count = len(self._queue) + len(self._fetching)
        wait_s = self._wait_before(len(self._queue))
        retry_after_s = max(1.0, wait_s / len(self._queue)) if wait_s and self._queue else 5.0
        if count >= self._max_queued_jobs:
            message = f"{count} jobs are waiting already, and no more may"
            raise QueueFull(
                message,
                retry_after_s=retry_after_s,
                quota=QuotaViolation("server", "max_queued_jobs", self._max_queued_jobs, message),
            )
        own = sum(waiting.job.owner == caller.name for waiting in (*self._queue, *self._fetching))
        if own >= caller.limits.max_queued_jobs:
            raise QuotaExceeded.of(
                "caller",
                "max_queued_jobs",
                caller.limits.max_queued_jobs,
                f"{own} of your jobs are waiting already, and no more may",
                retry_after_s=retry_after_s,
            )

    def _open_device(self, loop: asyncio.AbstractEventLoop) -> tuple[DeviceWorker, DeviceDescription]:
        description = describe_device(self._choice)

        def publish(snapshot: CacheSnapshot) -> None:
            loop.call_soon_threadsafe(self._take_snapshot, snapshot)

        cache = ModelCache(self._choice, self._budgets, publish=publish)
        return DeviceWorker(self._choice, description, cache), description

    def _take_snapshot(self, snapshot: CacheSnapshot) -> None:
        self._snapshot = snapshot

    async def _dispatch(self, worker: DeviceWorker) -> None:
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            waiting = self._take_next()
            self._running = waiting
            self._idle.clear()
            self._tell_positions()
            try:
                await self._run(worker, waiting)
            finally:
                waiting.adapters.release()
                self._running = None
                self._idle.set()

    def _take_next(self) -> _Waiting:
        """The first job whose weights are resident, unless it overtakes one that was overtaken too often."""
        chosen = 0
        for index, waiting in enumerate(self._queue):
            if self._snapshot.holds(waiting.job.set_key):
                chosen = index
                break
            if waiting.job.overtaken >= MAX_OVERTAKEN:
                break
        for index in range(chosen):
            self._queue[index].job.overtaken += 1
        waiting = self._queue[chosen]
        del self._queue[chosen]
        return waiting

    async def _run(self, worker: DeviceWorker, waiting: _Waiting) -> None:
        loop = asyncio.get_running_loop()
        job = waiting.job
        job.started_at = time.monotonic()
        job.started = datetime.now(UTC)

        def emit(report: Report) -> None:
            loop.call_soon_threadsafe(self._take, waiting, report)

        try:
            done = await loop.run_in_executor(self._device_thread, worker.run, job, waiting.files, emit)
        except ChromaError as error:
            self._end_early(job, error)
            if isinstance(error, DeviceLost):
                self._on_device_lost()
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            self._end_early(job, self._unforeseen(job, error))
        else:
            # The next job starts while this one's last image is still being encoded.
            finishing = asyncio.create_task(self._finish(waiting, done))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    def _take(self, waiting: _Waiting, report: Report) -> None:
        job = waiting.job
        match report:
            case RenderedImage() | RenderedPreview():
                task = asyncio.create_task(self._encode(waiting, report))
                waiting.encodings.add(task)
                task.add_done_callback(waiting.encodings.discard)
            case StageDone():
                for observer in self._observers:
                    observer.on_stage(job, report)
            case Step():
                prompt = job.plan.prompts[report.prompt_index]
                pixels = prompt.width * prompt.height
                job.pixel_steps_done += pixels
                job.done_steps += 1
                self._step_times.observe(job.plan.served_model, job.plan.profile, pixels, report.duration_s)
                job.log.append(report)
            case _:
                job.log.append(report)

    async def _encode(self, waiting: _Waiting, report: RenderedImage | RenderedPreview) -> None:
        loop = asyncio.get_running_loop()
        job = waiting.job
        started = time.monotonic()
        try:
            if isinstance(report, RenderedPreview):
                job.log.append(await loop.run_in_executor(self._image_thread, encode_preview, report))
                return
            header, data = await loop.run_in_executor(self._image_thread, encode_image, report, job.plan.output)
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            failure = self._unforeseen(job, error)
            job.cancellation.cancel(failure)
            self._end_early(job, failure)
            return
        waiting.image_encoding_s += time.monotonic() - started
        waiting.images += 1
        job.log.append(header)
        for chunk in split_chunks(report.prompt_index, data):
            job.log.append(chunk)

    async def _finish(self, waiting: _Waiting, done: WorkDone) -> None:
        job = waiting.job
        # The device thread's reports were scheduled before its return, so every encoding has begun by now.
        while waiting.encodings:
            await asyncio.wait(waiting.encodings)
        now = time.monotonic()
        started_at = job.started_at if job.started_at is not None else now
        timings = replace(
            done.timings,
            queued_s=started_at - job.admitted_at,
            image_encoding_s=waiting.image_encoding_s,
            total_s=now - job.admitted_at,
        )
        if job.log.closed:
            return
        job.log.append(Completed(timings, done.peak_memory_bytes, waiting.images))
        log.info(
            "job.completed",
            extra={"job_id": job.id, "caller": job.owner, "images": waiting.images, **_rounded(timings)},
        )

    def _end_early(self, job: Job, error: ChromaError) -> None:
        if job.log.closed:
            return
        fields: dict[str, object] = {"job_id": job.id, "caller": job.owner, "reason": error.reason}
        if job.cancellation.requested_at is not None:
            fields["freed_after_ms"] = round(1000 * (time.monotonic() - job.cancellation.requested_at), 1)
        if job.started_at is not None:
            fields["ran_s"] = round(time.monotonic() - job.started_at, 3)
        if isinstance(error, JobCancelled | JobDeadlineExceeded):
            job.log.append(Cancelled(error))
            log.info("job.cancelled", extra=fields)
        else:
            job.log.append(Failed(error))
            log.warning("job.failed", extra=fields)

    def _unforeseen(self, job: Job, error: Exception) -> InternalError:
        error_id = uuid.uuid4().hex[:12]
        log.error(
            "job.internal_error",
            exc_info=error,
            extra={"job_id": job.id, "caller": job.owner, "error_id": error_id},
        )
        return InternalError(f"internal error {error_id}", metadata={"error_id": error_id})

    def _tell_positions(self) -> None:
        for index, waiting in enumerate(self._queue):
            position = index + 1
            if waiting.job.position != position:
                waiting.job.position = position
                waiting.job.log.append(Queued(position, self._wait_before(index)))

    def _wait_before(self, index: int) -> float | None:
        """Seconds until the job at `index` of the queue starts; None while nothing was measured."""
        ahead = ([self._running] if self._running is not None else []) + [
            self._queue[place] for place in range(index)
        ]
        total = 0.0
        for waiting in ahead:
            plan = waiting.job.plan
            left = plan.pixel_steps - waiting.job.pixel_steps_done
            estimate = self._step_times.estimate_s(plan.served_model, plan.profile, left)
            if estimate is None:
                return None
            total += estimate
        return total


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
