"""A job's events to messages, field by field, and to the bytes that all their readers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from chromarpc.v1 import job_event_pb2, job_service_pb2
from chromarpc_server.domain import events
from chromarpc_server.domain.errors import MAX_LISTED
from chromarpc_server.domain.plan import Plan, PlanWarning
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.transport.messages.errors import failed_message
from chromarpc_server.transport.messages.options import noise_draw_message, output_message, trainer_message
from chromarpc_server.transport.messages.values import duration, shorten, timestamp

_STAGES = {
    events.LoadingStage.DOWNLOADING: job_event_pb2.LOADING_STAGE_DOWNLOADING,
    events.LoadingStage.READING: job_event_pb2.LOADING_STAGE_READING,
    events.LoadingStage.MERGING: job_event_pb2.LOADING_STAGE_MERGING,
    events.LoadingStage.QUANTIZING: job_event_pb2.LOADING_STAGE_QUANTIZING,
    events.LoadingStage.COMPILING: job_event_pb2.LOADING_STAGE_COMPILING,
}
MAX_KEY = 200
"""Characters of one key of an adapter's file."""
_MAX_METADATA_VALUE = 2000
MAX_ACCEPTED_BYTES = 2 * 2**20 - 128 * 2**10
"""Of a plan's message. With what a job gains, times, counts and why it failed, it stays under 2 MiB."""
MAX_PREPARED_BYTES = 2 * 2**20


def job_event(logged: LoggedEvent) -> job_event_pb2.JobEvent:
    """A logged event as its message."""
    message = job_event_pb2.JobEvent(sequence=logged.sequence, time=timestamp(logged.time))
    event = logged.event
    match event:
        case events.Accepted():
            message.accepted.CopyFrom(accepted_message(event.job_id, event.plan))
        case events.Restarted():
            message.restarted.attempt = event.attempt
            message.restarted.moved_from = event.moved_from
            message.restarted.bits_may_differ = event.bits_may_differ
        case events.Queued():
            message.queued.CopyFrom(_queued(event))
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
        case events.Failed():
            message.failed.CopyFrom(failed_message(event.error))
        case events.Cancelled():
            message.cancelled.message = shorten(event.error.message)
    return message


def encoded_event(logged: LoggedEvent) -> Any:
    """The response of `Generate` or `WatchJob` that holds a logged event, made once for all its readers.

    It is bytes, the same for both, which the interceptor sends as they are; hence no message's type.
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
    event = job_event_pb2.JobEvent(sequence=sequence, time=timestamp(time))
    place = job_event_pb2.ImageChunk(prompt_index=chunk.prompt_index, offset_bytes=chunk.offset_bytes)
    within = place.SerializeToString() + _field_head(_CHUNK_DATA_FIELD, len(chunk.data))
    head = event.SerializeToString() + _field_head(_IMAGE_CHUNK_FIELD, len(within) + len(chunk.data)) + within
    return b"".join((_field_head(_EVENT_FIELD, len(head) + len(chunk.data)), head, chunk.data))


def _field_head(field_number: int, size_bytes: int) -> bytes:
    """What stands before a field of so many bytes: its tag and its length."""
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


def cut_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The first entries of an adapter's header, each shortened."""
    return {
        shorten(key, MAX_KEY): shorten(value, _MAX_METADATA_VALUE)
        for key, value in list(metadata.items())[:MAX_LISTED]
    }


def heartbeat(sequence: int) -> job_event_pb2.JobEvent:
    """A sign of life, with the sequence of the event sent before it."""
    message = job_event_pb2.JobEvent(sequence=sequence, heartbeat=job_event_pb2.Heartbeat())
    message.time.GetCurrentTime()
    return message


def warning_messages(warnings: Iterable[PlanWarning]) -> list[job_event_pb2.Warning]:
    """What the caller should know of a request or of an adapter."""
    return [
        job_event_pb2.Warning(code=warning.code, field=warning.field, message=shorten(warning.message))
        for warning in warnings
    ]


def accepted_message(job_id: str, plan: Plan) -> job_event_pb2.Accepted:
    """The request as it is run; with its prompts cut where an earlier version admitted more than fits."""
    message = whole_accepted_message(job_id, plan)
    size = message.ByteSize()
    if size <= MAX_ACCEPTED_BYTES:
        return message
    text = f"the job has {size} bytes, too many for one message: its prompts are cut here, and are drawn whole"
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
        noise_draw=noise_draw_message(plan.noise_draw),
        prompts=[
            job_event_pb2.PlannedPrompt(
                prompt=prompt.prompt,
                width=prompt.width,
                height=prompt.height,
                sample_steps=prompt.sample_steps,
                guidance_scale=prompt.guidance_scale,
                seed=prompt.seed,
                neg=prompt.neg or None,
                sampler=prompt.sampler,
                schedule=prompt.schedule,
                shift=prompt.shift,
            )
            for prompt in plan.prompts
        ],
        loras=[
            job_event_pb2.PlannedLora(
                path=lora.path, network_multiplier=lora.network_multiplier, expected_sha256=lora.expected_sha256
            )
            for lora in plan.loras
        ],
        output=output_message(plan.output),
        warnings=warning_messages(plan.warnings),
        trainer=None if plan.trainer is None else trainer_message(plan.trainer),
        settings=plan.settings.value,
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
                unmatched_keys=[shorten(key, MAX_KEY) for key in adapter.unmatched_keys[:MAX_LISTED]],
                metadata=cut_metadata(adapter.metadata),
                placement=_PLACEMENTS[adapter.placement],
            )
            for adapter in event.adapters
        ],
        model_revision=event.model_revision,
        token_counts=[job_event_pb2.TokenCount(used=count.used, cut=count.cut) for count in event.token_counts],
        versions=dict(event.versions),
        device=event.device,
        device_id=event.device_id,
        second_device=event.second_device,
        stored_as=event.stored_as,
        weights=job_event_pb2.WeightsReport(
            source=_WEIGHTS_SOURCES[event.weights.source],
            rewritten_tensor_count=event.weights.rewritten_tensors,
            duration=duration(event.weights.duration_s),
            resident_set_count=event.weights.resident_sets,
            resident_bytes=event.weights.resident_bytes,
            evicted_set_count=event.weights.evicted_sets,
        ),
        warnings=warning_messages(event.warnings),
    )


def _queued(event: events.Queued) -> job_event_pb2.Queued:
    message = job_event_pb2.Queued(position=event.position)
    if event.estimated_wait_s is not None:
        message.estimated_wait.CopyFrom(duration(event.estimated_wait_s))
    return message


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
