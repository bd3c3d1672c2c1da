"""`JobService`: jobs that outlive their callers."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.v1 import generation_service_pb2, job_event_pb2, job_service_pb2, job_service_pb2_grpc
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import (
    ChromaError,
    FieldViolation,
    ImageNotFound,
    InvalidParameter,
    JobCancelled,
)
from chromarpc_server.domain.events import Failed
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.engine.engine import Engine
from chromarpc_server.engine.job import AnyJob, Job
from chromarpc_server.engine.job_book import QUEUED, RUNNING, Selection, place, state_of
from chromarpc_server.engine.store.job_store import CANCELLED, FAILED, SUCCEEDED
from chromarpc_server.transport.convert import (
    accepted_message,
    encoded_event,
    failed_message,
    fingerprint,
    generation_request,
    heartbeat,
    image_header_message,
)

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
HEARTBEAT_S = 10.0
_STATES = {
    QUEUED: job_service_pb2.JOB_STATE_QUEUED,
    RUNNING: job_service_pb2.JOB_STATE_RUNNING,
    SUCCEEDED: job_service_pb2.JOB_STATE_SUCCEEDED,
    FAILED: job_service_pb2.JOB_STATE_FAILED,
    CANCELLED: job_service_pb2.JOB_STATE_CANCELLED,
}
_STATES_BACK = {value: key for key, value in _STATES.items()}


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """Makes, watches and manages jobs of one engine, each for its owner only."""

    def __init__(self, engine: Engine, serving: Serving) -> None:
        """`serving`: what the settings say about requests."""
        self._engine = engine
        self._serving = serving

    async def CreateJob(  # noqa: N802
        self, request: job_service_pb2.CreateJobRequest, context: Any
    ) -> job_service_pb2.CreateJobResponse:
        """Queues one generation; answers once it is stored."""
        asked = request.request
        # Nobody is attached to it, so nobody's leaving ends it.
        plan = replace(resolve(generation_request(asked), self._serving), detached=True)
        job, existed = await self._engine.submit(
            plan,
            self._serving.models[plan.served_model],
            deadline_s=None,
            hf_token=asked.hf_token or None,
            caller=current_caller(),
            fingerprint=fingerprint(asked),
        )
        return job_service_pb2.CreateJobResponse(job=self._message(job), existed=existed)

    def violations(self, request: generation_service_pb2.GenerateRequest) -> tuple[FieldViolation, ...]:
        """What a request would be refused for before anything is looked up; it is not made."""
        try:
            resolve(generation_request(request), self._serving)
        except ChromaError as error:
            return error.violations
        return ()

    async def WatchJob(  # noqa: N802
        self, request: job_service_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.WatchJobResponse]:
        """Streams a job's events from any point until its last one."""
        job = await self._find(request.job_id)
        sequence = request.after_sequence
        if sequence > job.log.last_sequence:
            # Waiting for such an event would end without one: the job's end has a lower number.
            raise InvalidParameter(
                f"the job's last event so far is {job.log.last_sequence}", field="after_sequence"
            )
        self._engine.watch(job)
        async for logged in job.log.follow(
            sequence, idle_s=HEARTBEAT_S, omit_image_bytes=request.omit_image_bytes
        ):
            if logged is None:
                yield job_service_pb2.WatchJobResponse(event=heartbeat(sequence))
                continue
            sequence = logged.sequence
            yield encoded_event(logged)

    async def GetJob(  # noqa: N802
        self, request: job_service_pb2.GetJobRequest, context: Any
    ) -> job_service_pb2.GetJobResponse:
        """Tells how a job is."""
        return job_service_pb2.GetJobResponse(job=self._message(await self._find(request.job_id)))

    async def ListJobs(  # noqa: N802
        self, request: job_service_pb2.ListJobsRequest, context: Any
    ) -> job_service_pb2.ListJobsResponse:
        """Lists the caller's jobs, newest first."""
        size = _page_size(request.page_size)
        after = _read_token(request.page_token) if request.page_token else None
        since = _time(request.created_after, "created_after") if request.HasField("created_after") else None
        states = {_STATES_BACK.get(state, "") for state in request.states} or None
        selection = Selection(before=after, since=since, states=states)
        found = await self._engine.jobs.page(current_caller().name, size + 1, selection)
        page = found[:size]
        token = _page_token(page[-1]) if len(found) > size else ""
        return job_service_pb2.ListJobsResponse(jobs=[self._message(job) for job in page], next_page_token=token)

    async def CancelJob(  # noqa: N802
        self, request: job_service_pb2.CancelJobRequest, context: Any
    ) -> job_service_pb2.CancelJobResponse:
        """Stops a job."""
        job = await self._find(request.job_id)
        self._engine.cancel(job, JobCancelled("the job was cancelled"))
        await self._engine.settled(job)
        return job_service_pb2.CancelJobResponse(job=self._message(job))

    async def DeleteJob(  # noqa: N802
        self, request: job_service_pb2.DeleteJobRequest, context: Any
    ) -> job_service_pb2.DeleteJobResponse:
        """Forgets a job that ended."""
        _require_id(request.job_id)
        await self._engine.jobs.delete(current_caller().name, request.job_id)
        return job_service_pb2.DeleteJobResponse()

    async def GetImage(  # noqa: N802
        self, request: job_service_pb2.GetImageRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.GetImageResponse]:
        """Streams one picture again."""
        job = await self._find(request.job_id)
        index = request.prompt_index
        header = next((header for header in job.log.headers if header.prompt_index == index), None)
        if header is None or not job.log.has_image(header):
            raise ImageNotFound(
                f"the job has no image of prompt {index}" + ("" if job.log.closed else " yet"),
                field="prompt_index",
            )
        if request.offset_bytes > header.size_bytes:
            raise InvalidParameter(f"the image has {header.size_bytes} bytes", field="offset_bytes")
        yield job_service_pb2.GetImageResponse(image_header=image_header_message(header))
        async for chunk in job.log.image_chunks(index, request.offset_bytes):
            yield job_service_pb2.GetImageResponse(
                image_chunk=job_event_pb2.ImageChunk(
                    prompt_index=chunk.prompt_index, offset_bytes=chunk.offset_bytes, data=chunk.data
                )
            )

    async def _find(self, job_id: str) -> AnyJob:
        _require_id(job_id)
        return await self._engine.jobs.get(current_caller().name, job_id)

    def _message(self, job: AnyJob) -> job_service_pb2.Job:
        message = job_service_pb2.Job(
            job_id=job.id,
            request_id=job.plan.request_id or "",
            state=_STATES[state_of(job)],
            create_time=_timestamp(job.created),
            plan=accepted_message(job.id, job.plan),
            last_sequence=job.log.last_sequence,
            queue_position=job.position if isinstance(job, Job) and state_of(job) == QUEUED else 0,
            done_steps=job.done_steps,
            total_steps=sum(prompt.sample_steps for prompt in job.plan.prompts),
            images=[image_header_message(header) for header in job.log.headers],
            attempt_count=job.attempts,
        )
        if job.started is not None:
            message.start_time.CopyFrom(_timestamp(job.started))
        ending = job.log.ending
        if ending is not None:
            message.end_time.CopyFrom(_timestamp(ending.time))
            expires = self._engine.jobs.expires(job)
            if expires is not None:
                message.expire_time.CopyFrom(_timestamp(expires))
            if isinstance(ending.event, Failed):
                message.failure.CopyFrom(failed_message(ending.event.error))
        return message


def _require_id(job_id: str) -> None:
    if not job_id:
        raise InvalidParameter("a job id is required", field="job_id")


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _time(timestamp: Timestamp, field: str) -> datetime:
    """A timestamp that a client sent.

    Raises:
        InvalidParameter: it is none.
    """
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidParameter("is not a time", field=field) from None


def _page_size(asked: int) -> int:
    if not 0 <= asked <= MAX_PAGE_SIZE:
        raise InvalidParameter(f"must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}", field="page_size")
    return asked or DEFAULT_PAGE_SIZE


def _page_token(last: AnyJob) -> str:
    return base64.urlsafe_b64encode(json.dumps(place(last)).encode()).decode()


def _read_token(token: str) -> tuple[int, str]:
    try:
        match json.loads(base64.b64decode(token, altchars=b"-_", validate=True)):
            case [int(created_us), str(job_id)] if abs(created_us) < 2**63 and job_id.isascii():
                return created_us, job_id
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        pass
    raise InvalidParameter("not a token that this server gave", field="page_token")
