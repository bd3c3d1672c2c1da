"""A generation's messages to typed events, and the proof that the stream kept its contract.

Knows no call and no channel: the sync and the async client feed it the same messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf import duration_pb2, timestamp_pb2

from chromarpc import events
from chromarpc.errors import (
    Cancelled,
    FieldViolation,
    ProtocolError,
    StatusError,
    error_type,
    status_code,
)
from chromarpc.images import GeneratedImage
from chromarpc.jobs import JobMessage
from chromarpc.sampling import FLOWMATCH, REFERENCE
from chromarpc.v1 import job_event_pb2, options_pb2

MAX_IMAGE_BYTES: Final = 512 * 2**20
"""A 4096×4096 PNG of noise is about 50 MB; a server that announces more than this is not believed."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FORMATS: Final[dict[int, events.ImageFormat]] = {
    options_pb2.IMAGE_FORMAT_JPEG: "jpeg",
    options_pb2.IMAGE_FORMAT_WEBP: "webp",
    options_pb2.IMAGE_FORMAT_JPEG_TRAINER: "jpeg-trainer",
}
_STAGES: Final = {
    job_event_pb2.LOADING_STAGE_DOWNLOADING: events.LoadingStage.DOWNLOADING,
    job_event_pb2.LOADING_STAGE_READING: events.LoadingStage.READING,
    job_event_pb2.LOADING_STAGE_MERGING: events.LoadingStage.MERGING,
    job_event_pb2.LOADING_STAGE_QUANTIZING: events.LoadingStage.QUANTIZING,
    job_event_pb2.LOADING_STAGE_COMPILING: events.LoadingStage.COMPILING,
}
_WEIGHTS_SOURCES: Final = {
    job_event_pb2.WEIGHTS_SOURCE_RESIDENT: events.WeightsSource.RESIDENT,
    job_event_pb2.WEIGHTS_SOURCE_SWITCHED: events.WeightsSource.SWITCHED,
    job_event_pb2.WEIGHTS_SOURCE_BUILT: events.WeightsSource.BUILT,
}
_PLACEMENTS: Final = {
    job_event_pb2.ADAPTER_PLACEMENT_MERGED: events.AdapterPlacement.MERGED,
    job_event_pb2.ADAPTER_PLACEMENT_BESIDE: events.AdapterPlacement.BESIDE,
}
_LOKR_FORMS: Final[dict[int, events.LokrForm]] = {
    options_pb2.LOKR_FORM_FACTORIZED: "factorized",
    options_pb2.LOKR_FORM_WEIGHT: "weight",
}


class StreamReader:
    """Reads one generation's messages in order: `read` each, then `finish` once the stream has ended.

    Attributes:
        ending: the error that a `failed` or `cancelled` event told of; the call's own status follows it. Kept
            because gateways are known to drop the details of that status.
    """

    def __init__(self) -> None:
        self.ending: StatusError | None = None
        self._accepted: events.Accepted | None = None
        self._prepared: events.Prepared | None = None
        self._sequence = 0
        self._completed = False
        self._header: job_event_pb2.ImageHeader | None = None
        self._parts: list[bytes] = []
        self._have_bytes = 0
        self._hash = hashlib.sha256()
        self._images_read = 0

    @property
    def job_id(self) -> str | None:
        """Of the job, once it was accepted."""
        return self._accepted.job_id if self._accepted is not None else None

    @property
    def sequence(self) -> int:
        """Of the last event that was read."""
        return self._sequence

    def read(self, response: JobMessage) -> events.Event | None:
        """The event of a message; None for a part of an image, or for news this client does not know.

        Raises:
            ProtocolError: the message cannot be true, or cannot come here.
        """
        message = response.event
        kind = message.WhichOneof("event")
        self._check_order(message.sequence, kind)
        sequence, time = message.sequence, _time(message.time)
        match kind:
            case "accepted":
                self._accepted = _accepted(sequence, time, message.accepted)
                return self._accepted
            case "queued":
                return _queued(sequence, time, message.queued)
            case "loading":
                return _loading(sequence, time, message.loading)
            case "prepared":
                self._prepared = _prepared(sequence, time, message.prepared)
                return self._prepared
            case "step":
                return _step(sequence, time, message.step)
            case "preview":
                return _preview(sequence, time, message.preview)
            case "image_header":
                self._begin_image(message.image_header)
            case "image_chunk":
                return self._continue_image(sequence, time, message.image_chunk)
            case "completed":
                return self._complete(sequence, time, message.completed)
            case "failed" | "cancelled":
                self.ending = _ending(message)
            case "heartbeat":
                return events.Heartbeat(sequence=sequence, time=time)
            case "restarted":
                self._prepared, self._images_read = None, 0
                self._forget_image()
                return _restarted(sequence, time, message.restarted)
        return None

    def finish(self) -> None:
        """The stream ended without an error status.

        Raises:
            StatusError: its last event told of one.
            ProtocolError: it had no last event.
        """
        if self.ending is not None:
            raise self.ending
        if not self._completed:
            raise ProtocolError("the stream ended before the job did")

    def _check_order(self, sequence: int, kind: str | None) -> None:
        if self._completed or self.ending is not None:
            raise ProtocolError(f"an event ({kind}) came after the last one")
        if kind == "heartbeat":
            if sequence < self._sequence:
                raise ProtocolError(f"a heartbeat says {sequence} after event {self._sequence}")
            return
        if sequence <= self._sequence:
            raise ProtocolError(f"event {sequence} ({kind}) came after event {self._sequence}")
        self._sequence = sequence
        first = self._accepted is None
        if first != (kind == "accepted") and not (first and kind in ("failed", "cancelled")):
            raise ProtocolError(f"the first event is {kind}" if first else "the job was accepted twice")

    def _begin_image(self, header: job_event_pb2.ImageHeader) -> None:
        self._check_no_image_open("another image began")
        plan = self._accepted
        if plan is None or not 0 <= header.prompt_index < len(plan.prompts):
            raise ProtocolError(f"an image for prompt {header.prompt_index}, which was not asked for")
        if not 0 < header.size_bytes <= MAX_IMAGE_BYTES:
            raise ProtocolError(f"an image of {header.size_bytes} bytes was announced")
        self._header = header

    def _continue_image(
        self, sequence: int, time: datetime, chunk: job_event_pb2.ImageChunk
    ) -> events.ImageReady | None:
        header, plan = self._header, self._accepted
        if header is None or plan is None or chunk.prompt_index != header.prompt_index:
            raise ProtocolError(f"a part of image {chunk.prompt_index} came without its header")
        data = chunk.data  # each look at it copies it
        if chunk.offset_bytes != self._have_bytes:
            raise ProtocolError(
                f"a part of an image starts at byte {chunk.offset_bytes}, not at {self._have_bytes}"
            )
        if not data or self._have_bytes + len(data) > header.size_bytes:
            raise ProtocolError(f"parts of an image do not add up to its {header.size_bytes} bytes")
        self._parts.append(data)
        self._have_bytes += len(data)
        self._hash.update(data)  # while the next part is on its way, rather than all of them at the end
        if self._have_bytes < header.size_bytes:
            return None
        digest = self._hash.hexdigest()
        if digest != header.sha256.lower():
            raise ProtocolError(f"image {header.prompt_index} has SHA-256 {digest}, not {header.sha256}")
        whole = b"".join(self._parts)
        self._forget_image()
        self._images_read += 1
        image = GeneratedImage(
            prompt_index=header.prompt_index,
            data=whole,
            media_type=header.media_type,
            width=header.width,
            height=header.height,
            sha256=digest,
            seed=header.seed,
            plan=plan,
            prepared=self._prepared,
        )
        return events.ImageReady(sequence=sequence, time=time, prompt_index=header.prompt_index, image=image)

    def _forget_image(self) -> None:
        """Ready for another one's header."""
        self._header = None
        self._parts, self._have_bytes, self._hash = [], 0, hashlib.sha256()

    def _complete(self, sequence: int, time: datetime, message: job_event_pb2.Completed) -> events.Completed:
        self._check_no_image_open("the job completed")
        if message.image_count != self._images_read:
            raise ProtocolError(f"{message.image_count} images were sent, {self._images_read} arrived")
        self._completed = True
        timings = message.timings
        return events.Completed(
            sequence=sequence,
            time=time,
            timings=events.Timings(
                queued_s=_seconds(timings.queued),
                loading_s=_seconds(timings.loading),
                text_encoding_s=_seconds(timings.text_encoding),
                denoising_s=_seconds(timings.denoising),
                decoding_s=_seconds(timings.decoding),
                image_encoding_s=_seconds(timings.image_encoding),
                total_s=_seconds(timings.total),
            ),
            peak_memory_bytes=message.peak_memory_bytes,
            image_count=message.image_count,
        )

    def _check_no_image_open(self, happened: str) -> None:
        if self._header is not None:
            raise ProtocolError(
                f"{happened} after {self._have_bytes} of {self._header.size_bytes} bytes of image "
                f"{self._header.prompt_index}"
            )


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(timestamp: timestamp_pb2.Timestamp) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1000)
    except OverflowError:
        raise ProtocolError(f"an event is from {timestamp.seconds} s after 1970") from None


def _warnings(messages: Iterable[job_event_pb2.Warning]) -> tuple[events.JobWarning, ...]:
    return tuple(events.JobWarning(code=m.code, field=m.field, message=m.message) for m in messages)


def _accepted(sequence: int, time: datetime, message: job_event_pb2.Accepted) -> events.Accepted:
    output = message.output
    output_format = _FORMATS.get(output.format, "png")
    has_record = output.picture_record if output.HasField("picture_record") else output_format != "jpeg-trainer"
    return events.Accepted(
        sequence=sequence,
        time=time,
        job_id=message.job_id,
        model=message.model,
        served_model=message.served_model,
        profile=message.profile,
        noise_draw="legacy" if message.noise_draw == options_pb2.NOISE_DRAW_LEGACY else "float32",
        prompts=tuple(
            events.PlannedPrompt(
                prompt=prompt.prompt,
                width=prompt.width,
                height=prompt.height,
                sample_steps=prompt.sample_steps,
                guidance_scale=prompt.guidance_scale,
                seed=prompt.seed,
                neg=prompt.neg,
                sampler=prompt.sampler or FLOWMATCH,
                schedule=prompt.schedule or FLOWMATCH,
                shift=prompt.shift if prompt.HasField("shift") else None,
            )
            for prompt in message.prompts
        ),
        loras=tuple(
            events.PlannedLora(
                path=lora.path,
                network_multiplier=lora.network_multiplier,
                expected_sha256=lora.expected_sha256 if lora.HasField("expected_sha256") else None,
            )
            for lora in message.loras
        ),
        output_format=output_format,
        output_quality=output.quality if output.HasField("quality") else None,
        picture_record=has_record,
        trainer=_trainer(message.trainer) if message.HasField("trainer") else None,
        warnings=_warnings(message.warnings),
        settings=message.settings or REFERENCE,
    )


def _trainer(message: options_pb2.TrainerOptions) -> events.TrainerOptions:
    return events.TrainerOptions(
        quantize=message.quantize if message.HasField("quantize") else None,
        qtype=message.qtype if message.HasField("qtype") else None,
        quantize_te=message.quantize_te if message.HasField("quantize_te") else None,
        dtype=message.dtype if message.HasField("dtype") else None,
        lokr_form=_LOKR_FORMS.get(message.lokr_form),
    )


def _queued(sequence: int, time: datetime, message: job_event_pb2.Queued) -> events.Queued:
    known = message.HasField("estimated_wait")
    return events.Queued(
        sequence=sequence,
        time=time,
        position=message.position,
        estimated_wait_s=_seconds(message.estimated_wait) if known else None,
    )


def _loading(sequence: int, time: datetime, message: job_event_pb2.Loading) -> events.Loading:
    return events.Loading(
        sequence=sequence,
        time=time,
        stage=_STAGES.get(message.stage, events.LoadingStage.UNKNOWN),
        fraction=message.fraction,
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
    )


def _prepared(sequence: int, time: datetime, message: job_event_pb2.Prepared) -> events.Prepared:
    return events.Prepared(
        sequence=sequence,
        time=time,
        adapters=tuple(
            events.AdapterReport(
                path=adapter.path,
                sha256=adapter.sha256,
                format=adapter.format,
                network_multiplier=adapter.network_multiplier,
                rank=adapter.rank,
                matched_key_count=adapter.matched_key_count,
                unmatched_key_count=adapter.unmatched_key_count,
                unmatched_keys=tuple(adapter.unmatched_keys),
                metadata=dict(adapter.metadata),
                placement=_PLACEMENTS.get(adapter.placement, events.AdapterPlacement.UNKNOWN),
            )
            for adapter in message.adapters
        ),
        model_revision=message.model_revision,
        token_counts=tuple(events.TokenCount(used=t.used, cut=t.cut) for t in message.token_counts),
        versions=dict(message.versions),
        device=message.device,
        device_id=message.device_id,
        second_device=message.second_device,
        stored_as=message.stored_as,
        weights=events.WeightsReport(
            source=_WEIGHTS_SOURCES.get(message.weights.source, events.WeightsSource.UNKNOWN),
            rewritten_tensor_count=message.weights.rewritten_tensor_count,
            duration_s=message.weights.duration.ToTimedelta().total_seconds(),
            resident_set_count=message.weights.resident_set_count,
            evicted_set_count=message.weights.evicted_set_count,
            resident_bytes=message.weights.resident_bytes,
        ),
        warnings=_warnings(message.warnings),
    )


def _restarted(sequence: int, time: datetime, message: job_event_pb2.Restarted) -> events.Restarted:
    return events.Restarted(
        sequence=sequence,
        time=time,
        attempt=message.attempt,
        moved_from=message.moved_from,
        bits_may_differ=message.bits_may_differ,
    )


def _step(sequence: int, time: datetime, message: job_event_pb2.Step) -> events.Step:
    known = message.HasField("estimated_remaining")
    return events.Step(
        sequence=sequence,
        time=time,
        prompt_index=message.prompt_index,
        step=message.step,
        total_steps=message.total_steps,
        sigma=message.sigma,
        timestep=message.timestep,
        duration_s=_seconds(message.duration),
        estimated_remaining_s=_seconds(message.estimated_remaining) if known else None,
        sigmas=tuple(message.sigmas),
    )


def _preview(sequence: int, time: datetime, message: job_event_pb2.Preview) -> events.Preview:
    return events.Preview(
        sequence=sequence,
        time=time,
        prompt_index=message.prompt_index,
        step=message.step,
        media_type=message.media_type,
        width=message.width,
        height=message.height,
        data=message.data,
    )


def _ending(message: job_event_pb2.JobEvent) -> StatusError:
    if message.HasField("failed"):
        return _failed(message.failed)
    reason = message.cancelled.message or "the server cancelled the job"
    return Cancelled(reason, code=status_code(1), reason="CANCELLED")


def _failed(message: job_event_pb2.Failed) -> StatusError:
    code = status_code(message.code)
    return error_type(code, message.reason)(
        message.message or f"the job failed with {code.name}",
        code=code,
        reason=message.reason,
        violations=[FieldViolation(v.field, v.description) for v in message.violations],
        metadata=message.metadata,
        retry_after_s=_seconds(message.retry_after) if message.HasField("retry_after") else None,
    )
