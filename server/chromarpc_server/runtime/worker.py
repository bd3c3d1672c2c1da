"""Work on the device thread: load, prepare, encode, denoise, decode.

Everything that touches a tensor runs here, in one thread. What it has to say leaves as immutable events
through `emit`; the only thing that comes back is the cancellation, read between steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import ChromaError, DeviceLost, InvalidParameter, OutOfMemory
from chromarpc_server.domain.events import (
    Loading,
    LoadingStage,
    Step,
    Timings,
)
from chromarpc_server.domain.plan import Plan, PlannedPrompt
from chromarpc_server.domain.sampling_options import require_known_sampling
from chromarpc_server.domain.trainer import PREVIEW_PROFILES, TrainerSettings
from chromarpc_server.pipeline import (
    SILENT,
    CheckpointFiles,
    DeviceChoice,
    LoadContext,
    LoadProgress,
    NotComputable,
    Pipeline,
    PromptEmbedding,
    SamplingChoice,
    finished_steps,
    forget_frames,
    image_tokens,
    lacks_host_memory,
    library_versions,
    peak_memory_bytes,
    probe_device,
    reset_peak_memory,
    synchronize,
    translate_memory_error,
)
from chromarpc_server.runtime.model_cache import ModelCache, SetKey
from chromarpc_server.runtime.prepared_event import prepared_event
from chromarpc_server.runtime.watchdog import Watchdog
from chromarpc_server.runtime.work import Emit, RenderedImage, RenderedPreview, StageDone, Work, WorkDone

log = logging.getLogger(__name__)


@dataclass
class _Clock:
    """Seconds by stage, filled in and reported as the work goes along."""

    emit: Emit
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    def lap(self, stage: str, prompt_index: int | None = None) -> None:
        """Books the time since the last lap to `stage`."""
        now = time.monotonic()
        spent_s = now - self._since
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent_s
        self._since = now
        self.emit(StageDone(stage, spent_s, time.time_ns(), prompt_index))


class DeviceWorker:
    """Runs jobs, one at a time, on the thread that owns the device."""

    def __init__(
        self, choice: DeviceChoice, description: DeviceDescription, cache: ModelCache, watchdog: Watchdog
    ) -> None:
        """`choice`: device and dtype; `cache`: what is resident there; `watchdog`: is notified of what begins."""
        self._watchdog = watchdog
        self._choice = choice
        self._description = description
        self._cache = cache
        self._versions = library_versions()

    def load(self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]]) -> None:
        """Makes a model resident before any request asks for it, and on a GPU compiles, plans and records what
        images of these sizes (width, height) need.

        Raises:
            ChromaError: it cannot be loaded.
        """
        self._watchdog.other("loading a model")
        try:
            self._load(model_id, files, profile, sizes)
        except ChromaError:
            raise
        except Exception as error:
            found = self._classified(error, {"model": model_id})
            if found is error:
                raise
            raise found from None
        finally:
            self._cache.publish_fallbacks()
            self._watchdog.idle()

    def _load(self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]]) -> None:
        checkpoint = self._cache.checkpoint(model_id, files, SILENT)
        trainer = TrainerSettings() if profile in PREVIEW_PROFILES else None
        key = SetKey(model_id, profile, (), trainer)
        pipeline, _ = self._cache.pipeline(checkpoint, (), key, SILENT)
        if self._choice.device.type == "cuda":
            pipeline.warm_up(sizes)
            for card in self._choice.cards:
                synchronize(card)

    def run(self, work: Work, emit: Emit) -> WorkDone:
        """Does the work; `emit` takes every report.

        Raises:
            ChromaError: whatever ended it early, cancellation included.
        """
        try:
            return self._run(work, emit)
        except ChromaError as error:
            # A traceback holds the frames that hold the tensors, and the error outlives its run.
            raise error.with_traceback(None) from None
        except Exception as error:
            found = self._classified(error, {"job_id": work.id})
            if found is error:
                raise
            raise (_with_size(found, work.plan) if isinstance(found, OutOfMemory) else found) from None
        except BaseException as error:
            # Nothing that ends a thread may end this one unnoticed.
            log.critical("device.thread_ended", exc_info=error, extra={"job_id": work.id})
            raise DeviceLost("the thread that owns the device was ended") from None
        finally:
            self._cache.publish_fallbacks()
            self._watchdog.idle()

    def _classified(self, error: Exception, fields: Mapping[str, str]) -> Exception:
        """What an unforeseen exception is, once memory is free again and the device has shown whether it works."""
        out_of_memory = translate_memory_error(error)
        if out_of_memory is not None:
            self._free(error, fields)
        self._watchdog.other("probing the device")
        try:
            full = [probe_device(card) for card in self._choice.cards]
        except DeviceLost as lost:
            log.exception("device.lost", exc_info=error, extra={**fields, "cause": type(error).__name__})
            return lost.with_traceback(None)
        if any(full) and out_of_memory is None:
            # A library that said it in words that are not known.
            self._free(error, fields)
            return OutOfMemory("the device has too little memory")
        return out_of_memory or error

    def _free(self, error: Exception, fields: Mapping[str, str]) -> None:
        """Drops what the device holds; of what the host holds for all its devices only where the host is full."""
        forget_frames(error)
        try:
            self._cache.clear(host=lacks_host_memory(error))
        except Exception:  # the probe finds out whether the device still works
            log.exception("memory.not_freed", extra=fields)

    def _run(self, work: Work, emit: Emit) -> WorkDone:
        plan, check = work.plan, work.cancellation.check
        _require_computable(plan)
        self._watchdog.other("preparing a job")
        for card in self._choice.cards:
            reset_peak_memory(card)
        clock = _Clock(emit)
        check()
        context = LoadContext(check, _LoadingEvents(emit))
        checkpoint = self._cache.checkpoint(plan.served_model, work.model_files, context)
        adapters = self._cache.read_adapters(checkpoint, plan.loras, work.adapter_files, check=check)
        pipeline, weights = self._cache.pipeline(checkpoint, adapters, work.set_key, context)
        clock.lap("loading_s")

        tokenized = [pipeline.tokenize(prompt.prompt, plan.settings) for prompt in plan.prompts]
        negative = [
            pipeline.tokenize(prompt.neg, plan.settings) if prompt.neg else None for prompt in plan.prompts
        ]
        emit(
            prepared_event(
                plan,
                adapters,
                tokenized,
                negative,
                model_revision=checkpoint.revision,
                stored_as=checkpoint.stored_as,
                versions=self._versions,
                device=self._description,
                weights=weights,
                base_name=work.model_files.base_name,
                tiled_beyond_px=pipeline.tiled_beyond_px,
                fallbacks=pipeline.fallbacks,
                left_out=checkpoint.left_out,
                rounded=pipeline.transformer.rounded,
            )
        )
        remaining = _Remaining(plan)
        for index, tokens in enumerate(tokenized):
            check()
            self._watchdog.other("encoding a prompt")
            embedding = pipeline.encode(tokens, negative[index])
            synchronize(self._choice.device)
            clock.lap("text_encoding_s", index)
            check()
            self._draw(work, pipeline, embedding, index, remaining=remaining, clock=clock)
        return WorkDone(Timings(**clock.seconds), max(peak_memory_bytes(card) for card in self._choice.cards))

    def _draw(
        self,
        work: Work,
        pipeline: Pipeline,
        embedding: PromptEmbedding,
        index: int,
        *,
        remaining: _Remaining,
        clock: _Clock,
    ) -> None:
        plan, emit, cancellation = work.plan, clock.emit, work.cancellation
        prompt = plan.prompts[index]
        ended = time.monotonic()
        latents = None
        self._watchdog.step(calls=prompt.calls_per_step)
        steps = pipeline.denoise(
            embedding,
            width=prompt.width,
            height=prompt.height,
            steps=prompt.sample_steps,
            guidance_scale=prompt.guidance_scale,
            seed=prompt.seed,
            noise_draw=plan.noise_draw.value,
            choice=_choice(plan, prompt),
        )
        for done in finished_steps(steps, self._choice.device, cancellation.pause):
            began, ended = ended, time.monotonic()
            # The next step is being computed while this one is reported.
            self._watchdog.step(ended - began, calls=prompt.calls_per_step)
            emit(
                Step(
                    prompt_index=index,
                    step=done.index + 1,
                    total_steps=done.total,
                    sigma=done.sigma,
                    timestep=done.timestep,
                    duration_s=ended - began,
                    estimated_remaining_s=remaining.after(index, done.total - done.index - 1, ended - began),
                    sigmas=done.sigmas if done.index == 0 else (),
                )
            )
            step = done.index + 1
            if plan.preview and step < done.total and step % plan.preview.every_n_steps == 0:
                emit(
                    RenderedPreview(
                        index,
                        step,
                        pipeline.preview(done, prompt.width, prompt.height, plan.preview.max_side_px),
                    )
                )
            latents = done.latents
        cancellation.check()
        self._watchdog.other("decoding an image")
        clock.lap("denoising_s", index)
        if latents is None:
            raise ValueError(f"denoise yielded no step for {prompt.sample_steps} steps")
        pixels = pipeline.decode(latents, prompt.width, prompt.height, plan.settings)
        clock.lap("decoding_s", index)
        cancellation.check()
        emit(RenderedImage(index, prompt.seed, pixels))


def _with_size(error: OutOfMemory, plan: Plan) -> OutOfMemory:
    """Says how large the job's largest image is: memory is planned for a certain size."""
    largest = max(plan.prompts, key=lambda prompt: prompt.width * prompt.height)
    return OutOfMemory(
        f"{error.message} for this job, whose largest image is {largest.width}×{largest.height}; memory is "
        "planned for images up to 1024×1024"
    )


class _LoadingEvents:
    """Turns the pipeline's progress into events, a few for each stage rather than one for each tensor."""

    _INTERVAL_S = 0.2

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._stage = ""
        self._reported_at = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        now = time.monotonic()
        finished = progress.done_bytes >= progress.total_bytes
        if progress.stage == self._stage and not finished and now - self._reported_at < self._INTERVAL_S:
            return
        self._stage, self._reported_at = progress.stage, now
        self._emit(Loading(LoadingStage(progress.stage), progress.done_bytes, progress.total_bytes))


class _Remaining:
    """How long the rest of a job will take, from its own steps so far."""

    def __init__(self, plan: Plan) -> None:
        self._prompts = plan.prompts
        self._done = 0
        self._seconds = 0.0

    def after(self, index: int, steps_left: int, duration_s: float) -> float:
        """Takes in one step of an image that has so many left, and gives the seconds that the job has left."""
        step = self._prompts[index].pixels_per_step
        self._done += step
        self._seconds += duration_s
        left = steps_left * step + sum(prompt.pixel_steps for prompt in self._prompts[index + 1 :])
        return self._seconds / self._done * left


def _choice(plan: Plan, prompt: PlannedPrompt) -> SamplingChoice:
    return SamplingChoice(prompt.sampler, prompt.schedule, prompt.shift, plan.settings)


def _require_computable(plan: Plan) -> None:
    """Makes sure that every image's sampler has numbers for its schedule, before anything is loaded.

    Raises:
        InvalidParameter: one has none, so that its image would be none; or another version planned it, with a name
            that is not known here.
    """
    require_known_sampling(plan)
    for index, prompt in enumerate(plan.prompts):
        choice = _choice(plan, prompt)
        if choice.rounds_latents:  # Euler's steps are always numbers
            continue
        tokens = image_tokens(prompt.width, prompt.height)
        try:
            choice.evaluated(choice.sigmas(prompt.sample_steps, tokens))
        except NotComputable:
            raise InvalidParameter(
                f"{prompt.sampler} cannot be computed over {prompt.sample_steps} steps of the schedule "
                f"{prompt.schedule}, whose noise levels lie too close together or to 0: give fewer steps, a "
                "greater shift, or another sampler or schedule",
                field=f"prompts.{index}.sampler",
            ) from None
