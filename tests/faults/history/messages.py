"""Requests made of choices, and answers as the record has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from chromarpc.errors import from_status
from chromarpc.v1 import generation_service_pb2, job_event_pb2, job_service_pb2
from tests.faults.history import recorded
from tests.faults.history.choices import CANCEL, DETACH, NO_POLICY, Drawing
from tests.faults.history.recorded import JobView, Outcome, Recorder, SeenEvent, SeenImage

MODEL = "chroma-mini"
_State = job_service_pb2.JobState
STATES = {
    _State.JOB_STATE_QUEUED: recorded.QUEUED,
    _State.JOB_STATE_RUNNING: recorded.RUNNING,
    _State.JOB_STATE_SUCCEEDED: recorded.SUCCEEDED,
    _State.JOB_STATE_FAILED: recorded.FAILED,
    _State.JOB_STATE_CANCELLED: recorded.CANCELLED,
}
_Policy = generation_service_pb2.DisconnectPolicy
_POLICIES = {
    NO_POLICY: _Policy.DISCONNECT_POLICY_UNSPECIFIED,
    CANCEL: _Policy.DISCONNECT_POLICY_CANCEL,
    DETACH: _Policy.DISCONNECT_POLICY_DETACH,
}


def what(drawing: Drawing, adapter: str) -> str:
    """A request's drawing, as the record has it; `adapter`: the SHA-256, empty for none."""
    text = f"seed {drawing.seed}, {drawing.size_px} px, {drawing.steps} steps"
    return f"{text}, adapter {adapter[:12]}" if adapter else text


def generate_request(
    drawing: Drawing, *, request_id: str, policy: str, adapter: str
) -> generation_service_pb2.GenerateRequest:
    """The message."""
    loras = [generation_service_pb2.Lora(path=f"sha256:{adapter}")] if adapter else []
    prompt = generation_service_pb2.Prompt(
        prompt="a red circle",
        width=drawing.size_px,
        height=drawing.size_px,
        sample_steps=drawing.steps,
        seed=drawing.seed,
    )
    return generation_service_pb2.GenerateRequest(
        model=MODEL,
        loras=loras,
        prompts=[prompt],
        request_id=request_id or None,
        on_disconnect=_POLICIES[policy],
    )


def job_view(job: job_service_pb2.Job) -> JobView:
    """A job as an answer told it."""
    ending = job_service_pb2.Job(
        state=job.state,
        end_time=job.end_time,
        last_sequence=job.last_sequence,
        done_steps=job.done_steps,
        images=job.images,
        failure=job.failure,
    )
    return JobView(
        job_id=job.job_id,
        request_id=job.request_id,
        state=STATES[job.state],
        created_us=job.create_time.ToMicroseconds(),
        last_sequence=job.last_sequence,
        plan=plan_hash(job.plan),
        images=tuple(image.sha256 for image in job.images),
        reason=job.failure.reason,
        done_steps=job.done_steps,
        ending=_hash(ending.SerializeToString(deterministic=True)),
    )


def plan_hash(plan: job_event_pb2.Accepted) -> str:
    """A hash of a plan, the same for every job of one request."""
    same = job_event_pb2.Accepted()
    same.CopyFrom(plan)
    same.ClearField("job_id")
    return _hash(same.SerializeToString(deterministic=True))


def outcome(error: Any, target: str, *, is_cut: bool) -> Outcome:
    """How a call ended that gRPC raised an error for."""
    status = from_status(error.code(), error.details(), error.trailing_metadata(), target=target)
    return Outcome(
        status=error.code().name,
        reason=status.reason,
        message=status.message[:200],
        told_job=status.metadata.get("job_id", ""),
        is_cut=is_cut,
    )


class EventReader:
    """Takes in a job's stream."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.job_id = ""
        self.plan = ""
        self.events: list[SeenEvent] = []
        self._headers: dict[int, job_event_pb2.ImageHeader] = {}
        self._images: dict[int, bytearray] = {}

    def take(self, event: job_event_pb2.JobEvent) -> None:
        """The next one."""
        kind = event.WhichOneof("event") or ""
        same = job_event_pb2.JobEvent()
        same.CopyFrom(event)
        reason = message = ""
        match kind:
            case "accepted":
                self.job_id, self.plan = event.accepted.job_id, plan_hash(event.accepted)
                same.ClearField("time")
            case "restarted":
                self._headers.clear()
                self._images.clear()
            case "image_header":
                self._headers[event.image_header.prompt_index] = event.image_header
                self._images[event.image_header.prompt_index] = bytearray()
            case "image_chunk":
                if event.image_chunk.prompt_index in self._images:
                    self._images[event.image_chunk.prompt_index] += event.image_chunk.data
            case "failed":
                reason, message = event.failed.reason, event.failed.message
            case "cancelled":
                message = event.cancelled.message
        whole = _hash(same.SerializeToString(deterministic=True))
        self.events.append(SeenEvent(event.sequence, kind, whole, reason, message))

    def images(self, *, omitted: bool = False) -> Iterable[SeenImage]:
        """Those whose header came."""
        is_last = bool(self.events) and self.events[-1].kind == "completed" and not omitted
        for index, header in self._headers.items():
            yield seen_image(header, 0, bytes(self._images[index]), self._recorder, is_last=is_last)


def seen_image(
    header: job_event_pb2.ImageHeader, offset: int, data: bytes, recorder: Recorder, *, is_last: bool
) -> SeenImage:
    """Bytes of an image; `is_last`: all from the offset on were promised."""
    return SeenImage(header.prompt_index, header.sha256, header.size_bytes, offset, recorder.one_of(data), is_last)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
