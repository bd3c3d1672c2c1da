"""One run of a job: what the device reports goes into the job's log, and images are encoded and stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import ChromaError, LoraChanged, StoreError, StoreUnavailable
from chromarpc_server.domain.events import AdapterReport, Completed, ImageHeader, Prepared, Step
from chromarpc_server.jobs.completion import Completion, stopping, unforeseen
from chromarpc_server.jobs.encoding import ImageEncoder, split_chunks
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.jobs.picture_record import PictureRecord, picture_record
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.records import known_adapters
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.pipeline import translate_memory_error
from chromarpc_server.runtime.work import (
    EncodedImage,
    RenderedImage,
    RenderedPreview,
    Report,
    StageDone,
    WorkDone,
)


@dataclass
class Attempt:
    """One run of a job, and what is known of it so far."""

    job: Job
    device: DeviceDescription
    """What runs it."""
    prepared: Prepared | None = None
    """What it runs with, once that is known."""
    encoding_s: float = 0.0
    images: int = 0
    is_over: bool = False
    """Whether its device was lost, so that nothing counts that it still reports."""
    unstored: StoreError | None = None
    """Why one of its images could not be stored."""


class AttemptRecorder:
    """Takes in what devices report of attempts. Lives on the event loop."""

    def __init__(
        self,
        store: JobStore,
        completion: Completion,
        tasks: Tasks,
        encoder: ImageEncoder,
        estimates: StepTimes,
        observers: Sequence[JobObserver],
    ) -> None:
        """Begins with nothing.

        Args:
            store: keeps images, and what is known of adapters.
            completion: ends jobs.
            tasks: those of the engine.
            encoder: makes files of pixels.
            estimates: learns from measured steps.
            observers: are notified of every stage.
        """
        self._store = store
        self._completion = completion
        self._tasks = tasks
        self._encoder = encoder
        self._estimates = estimates
        self._observers = tuple(observers)

    def take(self, attempt: Attempt, report: Report) -> None:
        """The device has something to report."""
        job = attempt.job
        if attempt.is_over:
            return
        match report:
            case RenderedImage() | RenderedPreview() | EncodedImage():
                task = self._tasks.start(
                    self._keep(attempt, report)
                    if isinstance(report, EncodedImage)
                    else self._encode(attempt, report)
                )
                job.encodings.add(task)
                task.add_done_callback(job.encodings.discard)
            case StageDone():
                for observer in self._observers:
                    observer.on_stage(job, report)
            case Prepared():
                self._take_prepared(attempt, report)
            case Step():
                pixels = job.plan.prompts[report.prompt_index].pixels_per_step
                job.pixel_steps_done += pixels
                job.done_steps += 1
                self._estimates.observe(
                    attempt.device.name, job.plan.served_model, job.plan.profile, pixels, report.duration_s
                )
                job.log.append(report)
            case _:
                job.log.append(report)

    async def finish(self, attempt: Attempt, done: WorkDone) -> None:
        """Ends the job, whose work is done, once its images are stored."""
        job = attempt.job
        # The device's reports came before its return, so every encoding has begun by now.
        while job.encodings:
            await asyncio.wait(job.encodings)
        # A cancel that came after the device's last look, and was or will be acknowledged, holds.
        ended_by = job.cancelled_for_good
        if attempt.unstored is not None:
            ended_by = job.cancellation.cause or attempt.unstored
            if ended_by is attempt.unstored and self._completion.is_stopping and self._store.is_durable:
                self._completion.set_aside(job, stopping())  # the next process may have room for its images
                return
        if ended_by is not None:
            self._completion.end_early(job, ended_by)
            return
        now = time.monotonic()
        started_at = job.started_at if job.started_at is not None else now
        timings = replace(
            done.timings,
            queued_s=started_at - job.admitted_at,
            image_encoding_s=attempt.encoding_s,
            total_s=now - job.admitted_at,
        )
        rounded = {name: round(seconds, 3) for name, seconds in vars(timings).items()}
        event = Completed(timings, done.peak_memory_bytes, attempt.images)
        self._completion.complete(job, event, {"images": attempt.images, **rounded})

    def _take_prepared(self, attempt: Attempt, report: Prepared) -> None:
        job = attempt.job
        attempt.prepared = report
        job.log.append(report)
        changed = changed_adapter(job, report.adapters)
        if changed is not None:
            job.cancellation.cancel(changed)
        elif report.adapters:
            self._tasks.start(self._note_hashes(job, [adapter.sha256 for adapter in report.adapters]))

    async def _note_hashes(self, job: Job, hashes: Sequence[str]) -> None:
        with suppress(StoreError):
            await self._store.note_adapters(job, known_adapters(job.adapter_files, hashes))

    async def _encode(self, attempt: Attempt, report: RenderedImage | RenderedPreview) -> None:
        job = attempt.job
        started = time.monotonic()
        try:
            if isinstance(report, RenderedPreview):
                preview = await self._encoder.preview(job.id, report)
                if not attempt.is_over:
                    job.log.append(preview)
                return
            header, data = await self._encoder.image(
                job.id, report, job.plan.output, _record(attempt, report.prompt_index)
            )
        except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
            if attempt.is_over:
                return
            failure: ChromaError = translate_memory_error(error) or unforeseen(job, error)
            job.cancellation.cancel(failure)
            self._completion.end_early(job, failure)
            return
        await self._keep(attempt, EncodedImage(header, data, time.monotonic() - started))

    async def _keep(self, attempt: Attempt, image: EncodedImage) -> None:
        job, header = attempt.job, image.header
        attempt.encoding_s += image.encoding_s
        if job.log.sealed or attempt.is_over:
            return
        attempt.images += 1
        job.log.append(header)
        for chunk in split_chunks(header.prompt_index, image.data):
            job.log.append(chunk)
        attempt.unstored = await self._put(attempt, header, image.data) or attempt.unstored

    async def _put(self, attempt: Attempt, header: ImageHeader, data: bytes) -> StoreError | None:
        """Stores an image, on a full disk once there is room; why not, where the job or the server is stopped
        before, or the attempt's device is lost.
        """
        job = attempt.job
        while True:
            try:
                await self._store.put_image(job, header, data)
            except StoreError as error:
                is_lasting = not isinstance(error, StoreUnavailable) or not self._store.is_durable
                if is_lasting or job.cancellation.cause is not None or await self._completion.stops_meanwhile():
                    return error
                if attempt.is_over:  # the next one has images of its own, and nobody would let go of this one
                    return error
            else:
                return None


def _record(attempt: Attempt, prompt_index: int) -> PictureRecord | None:
    """What an image is to carry; None for nothing."""
    plan = attempt.job.plan
    if attempt.prepared is None or not plan.output.picture_record:
        return None
    return picture_record(plan, prompt_index, attempt.prepared, device_dtype=attempt.device.dtype)


def changed_adapter(job: Job, reports: Sequence[AdapterReport]) -> LoraChanged | None:
    """What is wrong with the adapters that were read, where the job had others before."""
    for index, (report, sha256) in enumerate(zip(reports, job.adapter_hashes, strict=False)):
        if sha256 is not None and report.sha256 != sha256:
            return LoraChanged(
                "the adapter has other bytes than when it was read before",
                field=f"loras.{index}.path",
                metadata={"sha256_before": sha256, "sha256_now": report.sha256},
            )
    return None
