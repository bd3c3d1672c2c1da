"""A job's description, and how large it may be: stock clients take messages of up to 4 MiB."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from chromarpc.v1 import job_service_pb2
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.events import Failed
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.job import AnyJob, DamagedJob, Job
from chromarpc_server.jobs.registry import QUEUED, RUNNING, state_of
from chromarpc_server.jobs.store.rows import CANCELLED, FAILED, SUCCEEDED
from chromarpc_server.transport.messages.errors import failed_message
from chromarpc_server.transport.messages.events import (
    MAX_ACCEPTED_BYTES,
    accepted_message,
    image_header_message,
    whole_accepted_message,
)
from chromarpc_server.transport.messages.values import timestamp

_IMAGE_BYTES: Final = 192
"""Of an `ImageHeader` with the largest numbers, and of its place in the job."""
_ID: Final = "0" * 32
"""As long as any job's."""

STATES: Final = {
    QUEUED: job_service_pb2.JOB_STATE_QUEUED,
    RUNNING: job_service_pb2.JOB_STATE_RUNNING,
    SUCCEEDED: job_service_pb2.JOB_STATE_SUCCEEDED,
    FAILED: job_service_pb2.JOB_STATE_FAILED,
    CANCELLED: job_service_pb2.JOB_STATE_CANCELLED,
}


def require_describable(plan: Plan) -> None:
    """Makes sure that the job fits into the answer to whoever asks for it.

    Raises:
        InvalidParameter: the job would be too large a message.
    """
    accepted = whole_accepted_message(_ID, plan)
    size = accepted.ByteSize() + len(plan.prompts) * _IMAGE_BYTES
    if size <= MAX_ACCEPTED_BYTES:
        return
    parts = {
        "prompts": sum(prompt.ByteSize() for prompt in accepted.prompts),
        "loras": sum(lora.ByteSize() for lora in accepted.loras),
    }
    field = max(parts, key=lambda name: parts[name])
    raise InvalidParameter(
        f"the job's description would have {size} bytes, {parts[field]} of them in {field}, and may have "
        f"{MAX_ACCEPTED_BYTES}: send several requests with fewer or shorter ones",
        field=field,
    )


def damaged_job_message(job: DamagedJob) -> job_service_pb2.Job:
    """What a list says of a job that cannot be read."""
    return job_service_pb2.Job(
        job_id=job.id,
        state=job_service_pb2.JOB_STATE_FAILED,
        create_time=timestamp(job.created),
        failure=failed_message(job.error),
    )


def job_message(job: AnyJob, expires: datetime | None) -> job_service_pb2.Job:
    """The job as it is now; `expires`: when it is forgotten, where that is known."""
    message = job_service_pb2.Job(
        job_id=job.id,
        request_id=job.plan.request_id or "",
        state=STATES[state_of(job)],
        create_time=timestamp(job.created),
        plan=accepted_message(job.id, job.plan),
        last_sequence=job.log.last_sequence,
        queue_position=job.position if isinstance(job, Job) and state_of(job) == QUEUED else 0,
        done_steps=job.done_steps,
        total_steps=max(job.done_steps, sum(prompt.sample_steps for prompt in job.plan.prompts)),
        images=[image_header_message(header) for header in job.log.headers],
        attempt_count=job.attempts,
    )
    if job.started is not None:
        message.start_time.CopyFrom(timestamp(job.started))
    ending = job.log.ending
    if ending is not None:
        message.end_time.CopyFrom(timestamp(ending.time))
        if expires is not None:
            message.expire_time.CopyFrom(timestamp(expires))
        if isinstance(ending.event, Failed):
            message.failure.CopyFrom(failed_message(ending.event.error))
    return message
