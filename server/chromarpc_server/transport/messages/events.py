"""Messages to domain values and back, field by field and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from google.protobuf import duration_pb2, unknown_fields
from google.protobuf.message import Message

from chromarpc.v1 import generation_service_pb2, job_event_pb2, job_service_pb2, options_pb2
from chromarpc_server.domain import events
from chromarpc_server.domain.errors import MAX_LISTED, ChromaError
from chromarpc_server.domain.plan import Plan, PlannedOutput, PlanWarning
from chromarpc_server.domain.requests import (
    GenerationRequest,
    ImageFormat,
    LoraRequest,
    NoiseDraw,
    OutputRequest,
    PreviewRequest,
    PromptRequest,
)
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.transport.messages.errors import code_number, duration, listed, shorten
from chromarpc_server.transport.messages.options import trainer_message, trainer_request

_FORMATS = {
    options_pb2.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    options_pb2.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
    options_pb2.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
    options_pb2.IMAGE_FORMAT_JPEG_TRAINER: ImageFormat.JPEG_TRAINER,
}
_FORMATS_BACK = {value: key for key, value in _FORMATS.items()}
_DRAWS = {
    options_pb2.NOISE_DRAW_FLOAT32: NoiseDraw.FLOAT32,
    options_pb2.NOISE_DRAW_LEGACY: NoiseDraw.LEGACY,
}
_DRAWS_BACK = {value: key for key, value in _DRAWS.items()}
_STAGES = {
    events.LoadingStage.DOWNLOADING: job_event_pb2.LOADING_STAGE_DOWNLOADING,
    events.LoadingStage.READING: job_event_pb2.LOADING_STAGE_READING,
    events.LoadingStage.MERGING: job_event_pb2.LOADING_STAGE_MERGING,
    events.LoadingStage.QUANTIZING: job_event_pb2.LOADING_STAGE_QUANTIZING,
    events.LoadingStage.COMPILING: job_event_pb2.LOADING_STAGE_COMPILING,
}
MAX_UNKNOWN_FIELDS = 100
MAX_UNMATCHED_BYTES = 200
MAX_METADATA_BYTES = 2000
MAX_ACCEPTED_BYTES = 2 * 2**20 - 128 * 2**10
"""Of a plan as it is told. With what a job gains, times, counts and why it failed, it stays under 2 MiB."""
MAX_PREPARED_BYTES = 2 * 2**20


def _optional(message: Message, *names: str) -> dict[str, object]:
    """The fields of `names` that were set; what was left out stays out."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _unknown(message: Message, at: str) -> Iterator[str]:
    for field in unknown_fields.UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield f"{at}field {field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        name = f"{at}{descriptor.name}"
        if descriptor.is_repeated:
            for index, item in enumerate(value):
                yield from _unknown(item, f"{name}.{index}.")
        else:
            yield from _unknown(value, f"{name}.")


_PLAIN_FIELDS = (
    "model",
    "hf_token",
    "trigger_word",
    "kv_cache",
    "match_target_res",
    "profile",
    "request_id",
)


def generation_request(message: generation_service_pb2.GenerateRequest) -> GenerationRequest:
    """The request as a domain value: nothing checked, nothing filled in."""
    unknown = []
    for path in _unknown(message, ""):
        unknown.append(path)
        if len(unknown) >= MAX_UNKNOWN_FIELDS:
            break
    image_format = message.output.format
    if image_format and image_format not in _FORMATS:
        unknown.append("output.format")
    if message.noise_draw and message.noise_draw not in _DRAWS:
        unknown.append("noise_draw")
    if message.on_disconnect not in generation_service_pb2.DisconnectPolicy.values():
        unknown.append("on_disconnect")
    if message.trainer.lokr_form not in options_pb2.LokrForm.values():
        unknown.append("trainer.lokr_form")
    return GenerationRequest(
        **_optional(
            message, "model", "hf_token", "trigger_word", "kv_cache", "match_target_res", "profile", "request_id"
        ),  # type: ignore[arg-type]
        loras=tuple(
            LoraRequest(**_optional(lora, "path", "transformer", "network_multiplier", "expected_sha256"))  # type: ignore[arg-type]
            for lora in message.loras
        ),
        prompts=tuple(_prompt(prompt) for prompt in message.prompts),
        output=OutputRequest(
            format=_FORMATS.get(image_format),
            **_optional(message.output, "quality", "picture_record"),  # type: ignore[arg-type]
        ),
        preview=PreviewRequest(
            every_n_steps=message.preview.every_n_steps,
            **_optional(message.preview, "max_side_px"),  # type: ignore[arg-type]
        ),
        noise_draw=_DRAWS.get(message.noise_draw),
        detach=message.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_DETACH,
        cancel_at_once=message.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_CANCEL,
        max_queue_s=_seconds(message.max_queue_time) if message.HasField("max_queue_time") else None,
        trainer=trainer_request(message.trainer) if message.HasField("trainer") else None,
        unknown_fields=tuple(unknown),
    )


def _prompt(message: generation_service_pb2.Prompt) -> PromptRequest:
    names = [field.name for field in message.DESCRIPTOR.fields]
    return PromptRequest(**_optional(message, *names))  # type: ignore[arg-type]


def job_event(logged: LoggedEvent) -> job_event_pb2.JobEvent:
    """A logged event as its message."""
    message = job_event_pb2.JobEvent(sequence=logged.sequence)
    message.time.FromDatetime(logged.time)
    event = logged.event
    match event:
        case events.Accepted():
            message.accepted.CopyFrom(accepted_message(event.job_id, event.plan))
        case events.Restarted():
            message.restarted.attempt = event.attempt
        case events.Queued():
            message.queued.position = event.position
            if event.estimated_wait_s is not None:
                message.queued.estimated_wait.CopyFrom(duration(event.estimated_wait_s))
        case events.Loading():
            message.loading.stage = _STAGES[event.stage]
            message.loading.fraction = event.fraction
            message.loading.done_bytes = event.done_bytes
            message.loading.total_bytes = event.total_bytes
        case events.Prepared():
            message.prepared.CopyFrom(_prepared(event))
        case events.Step():
            message.step.CopyFrom(_step(event))
        case events.Preview():
            message.preview.CopyFrom(
                job_event_pb2.Preview(
                    prompt_index=event.prompt_index,
                    step=event.step,
                    media_type=event.media_type,
                    width=event.width,
                    height=event.height,
                    data=event.data,
                )
            )
        case events.ImageHeader():
            message.image_header.CopyFrom(image_header_message(event))
        case events.ImageChunk():
            message.image_chunk.prompt_index = event.prompt_index
            message.image_chunk.offset_bytes = event.offset_bytes
            message.image_chunk.data = event.data
        case events.Completed():
            message.completed.CopyFrom(_completed(event))
        case events.Failed() | events.Cancelled():
            _tell_ending(message, event)
    return message


def _tell_ending(message: job_event_pb2.JobEvent, event: events.Failed | events.Cancelled) -> None:
    if isinstance(event, events.Failed):
        message.failed.CopyFrom(failed_message(event.error))
    else:
        message.cancelled.message = shorten(event.error.message)


def encoded_event(logged: LoggedEvent) -> Any:
    """The response of `Generate` or `WatchJob` that holds a logged event, made once for all its readers.

    It is bytes, the same for both, and whoever surrounds the handlers lets bytes through; hence no message's type.
    """
    return logged.encoded(_encode)


def _encode(logged: LoggedEvent) -> bytes:
    if isinstance(logged.event, events.ImageChunk):
        return _encode_chunk(logged.sequence, logged.time, logged.event)
    return job_service_pb2.WatchJobResponse(event=job_event(logged)).SerializeToString()


_CHUNK_DATA_FIELD = job_event_pb2.ImageChunk.DATA_FIELD_NUMBER
_IMAGE_CHUNK_FIELD = job_event_pb2.JobEvent.IMAGE_CHUNK_FIELD_NUMBER
_EVENT_FIELD = job_service_pb2.WatchJobResponse.EVENT_FIELD_NUMBER


def _encode_chunk(sequence: int, time: datetime, chunk: events.ImageChunk) -> bytes:
    """What protobuf makes of the same, byte for byte, with the image's bytes copied once.

    protobuf moves them several times and takes 0.3 ms for 128 KiB, for each reader: more than the sending does.
    """
    event = job_event_pb2.JobEvent(sequence=sequence)
    event.time.FromDatetime(time)
    place = job_event_pb2.ImageChunk(prompt_index=chunk.prompt_index, offset_bytes=chunk.offset_bytes)
    within = place.SerializeToString() + _announce(_CHUNK_DATA_FIELD, len(chunk.data))
    head = event.SerializeToString() + _announce(_IMAGE_CHUNK_FIELD, len(within) + len(chunk.data)) + within
    return b"".join((_announce(_EVENT_FIELD, len(head) + len(chunk.data)), head, chunk.data))


def _announce(field_number: int, size_bytes: int) -> bytes:
    """Says that a field of so many bytes follows: its tag and its length."""
    return _varint(field_number << 3 | 2) + _varint(size_bytes)


def _varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def image_header_message(event: events.ImageHeader) -> job_event_pb2.ImageHeader:
    """What an image's bytes are."""
    return job_event_pb2.ImageHeader(
        prompt_index=event.prompt_index,
        media_type=event.media_type,
        size_bytes=event.size_bytes,
        width=event.width,
        height=event.height,
        sha256=event.sha256,
        seed=event.seed,
    )


def fingerprint(request: generation_service_pb2.GenerateRequest) -> str:
    """Hash of what a request asks for, hexadecimal; of neither its id nor its secrets."""
    asked = generation_service_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.ClearField("hf_token")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def heartbeat(sequence: int) -> job_event_pb2.JobEvent:
    """A sign of life, with the sequence of the event sent before it."""
    message = job_event_pb2.JobEvent(sequence=sequence, heartbeat=job_event_pb2.Heartbeat())
    message.time.GetCurrentTime()
    return message


def _warnings(warnings: tuple[PlanWarning, ...]) -> list[job_event_pb2.Warning]:
    return [
        job_event_pb2.Warning(code=warning.code, field=warning.field, message=shorten(warning.message))
        for warning in warnings
    ]


def _output(output: PlannedOutput) -> options_pb2.OutputOptions:
    message = options_pb2.OutputOptions(format=_FORMATS_BACK[output.format])
    if output.format not in (ImageFormat.PNG, ImageFormat.JPEG_TRAINER):
        message.quality = output.quality
    message.picture_record = output.picture_record
    return message


def accepted_message(job_id: str, plan: Plan) -> job_event_pb2.Accepted:
    """The request as it is run; with its prompts cut where an earlier version admitted too much to tell."""
    message = whole_accepted_message(job_id, plan)
    size = message.ByteSize()
    if size <= MAX_ACCEPTED_BYTES:
        return message
    text = f"the job has {size} bytes, too many to be told: its prompts are cut here, and are drawn whole"
    message.warnings.add(code=WarningCode.PROMPTS_CUT, field="prompts", message=text)
    longest = MAX_ACCEPTED_BYTES
    while message.ByteSize() > MAX_ACCEPTED_BYTES and longest:
        longest //= 2
        for prompt in message.prompts:
            prompt.prompt = shorten(prompt.prompt, max(1, longest))
    return message


def whole_accepted_message(job_id: str, plan: Plan) -> job_event_pb2.Accepted:
    """The same, however large."""
    return job_event_pb2.Accepted(
        job_id=job_id,
        model=plan.model,
        served_model=plan.served_model,
        profile=plan.profile,
        noise_draw=_DRAWS_BACK[plan.noise_draw],
        prompts=[
            job_event_pb2.PlannedPrompt(
                prompt=prompt.prompt,
                width=prompt.width,
                height=prompt.height,
                sample_steps=prompt.sample_steps,
                guidance_scale=prompt.guidance_scale,
                seed=prompt.seed,
                neg=prompt.neg or None,
            )
            for prompt in plan.prompts
        ],
        loras=[
            job_event_pb2.PlannedLora(
                path=lora.path, network_multiplier=lora.network_multiplier, expected_sha256=lora.expected_sha256
            )
            for lora in plan.loras
        ],
        output=_output(plan.output),
        warnings=_warnings(plan.warnings),
        trainer=None if plan.trainer is None else trainer_message(plan.trainer),
    )


_WEIGHTS_SOURCES = {
    source: job_event_pb2.WeightsSource.Value(f"WEIGHTS_SOURCE_{source.name}") for source in events.WeightsSource
}
_PLACEMENTS = {
    placement: job_event_pb2.AdapterPlacement.Value(f"ADAPTER_PLACEMENT_{placement.name}")
    for placement in events.AdapterPlacement
}


def _prepared(event: events.Prepared) -> job_event_pb2.Prepared:
    message = _whole_prepared(event)
    for adapter in reversed(message.adapters):  # many adapters, each with much to say of itself
        if message.ByteSize() <= MAX_PREPARED_BYTES:
            break
        adapter.ClearField("metadata")
        adapter.ClearField("unmatched_keys")
    return message


def _whole_prepared(event: events.Prepared) -> job_event_pb2.Prepared:
    return job_event_pb2.Prepared(
        adapters=[
            job_event_pb2.AdapterReport(
                path=adapter.path,
                sha256=adapter.sha256,
                format=adapter.format,
                network_multiplier=adapter.network_multiplier,
                rank=adapter.rank,
                matched_key_count=adapter.matched_keys,
                unmatched_key_count=len(adapter.unmatched_keys),
                unmatched_keys=[shorten(key, MAX_UNMATCHED_BYTES) for key in adapter.unmatched_keys[:MAX_LISTED]],
                metadata={
                    shorten(key, MAX_UNMATCHED_BYTES): shorten(value, MAX_METADATA_BYTES)
                    for key, value in list(adapter.metadata.items())[:MAX_LISTED]
                },
                placement=_PLACEMENTS[adapter.placement],
            )
            for adapter in event.adapters
        ],
        model_revision=event.model_revision,
        token_counts=[job_event_pb2.TokenCount(used=count.used, cut=count.cut) for count in event.token_counts],
        versions=dict(event.versions),
        device=event.device,
        weights=job_event_pb2.WeightsReport(
            source=_WEIGHTS_SOURCES[event.weights.source],
            rewritten_tensor_count=event.weights.rewritten_tensors,
            duration=duration(event.weights.duration_s),
            resident_set_count=event.weights.resident_sets,
            resident_bytes=event.weights.resident_bytes,
            evicted_set_count=event.weights.evicted_sets,
        ),
        warnings=_warnings(event.warnings),
    )


def _step(event: events.Step) -> job_event_pb2.Step:
    message = job_event_pb2.Step(
        prompt_index=event.prompt_index,
        step=event.step,
        total_steps=event.total_steps,
        sigma=event.sigma,
        timestep=event.timestep,
        duration=duration(event.duration_s),
        sigmas=event.sigmas,
    )
    if event.estimated_remaining_s is not None:
        message.estimated_remaining.CopyFrom(duration(event.estimated_remaining_s))
    return message


def _completed(event: events.Completed) -> job_event_pb2.Completed:
    timings = event.timings
    return job_event_pb2.Completed(
        timings=job_event_pb2.Timings(
            queued=duration(timings.queued_s),
            loading=duration(timings.loading_s),
            text_encoding=duration(timings.text_encoding_s),
            denoising=duration(timings.denoising_s),
            decoding=duration(timings.decoding_s),
            image_encoding=duration(timings.image_encoding_s),
            total=duration(timings.total_s),
        ),
        peak_memory_bytes=event.peak_memory_bytes,
        image_count=event.image_count,
    )


def failed_message(error: ChromaError) -> job_event_pb2.Failed:
    """Why a job failed."""
    message = job_event_pb2.Failed(
        code=code_number(error),
        reason=error.reason,
        message=shorten(error.message, 1000),
        violations=[
            job_event_pb2.FieldViolation(field=violation.field, description=violation.description)
            for violation in listed(error.violations)
        ],
        metadata={key: shorten(value) for key, value in error.metadata.items()},
    )
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(duration(error.retry_after_s))
    return message
