"""`JobService`: jobs that outlive their callers."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.v1 import job_event_pb2, job_service_pb2, job_service_pb2_grpc
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import ImageNotFound, InvalidParameter, JobCancelled
from chromarpc_server.domain.events import Cancelled, Completed, Failed, ImageChunk, ImageHeader
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.engine.engine import Engine
from chromarpc_server.engine.job import Job
from chromarpc_server.transport.convert import (
    accepted_message,
    failed_message,
    fingerprint,
    generation_request,
    heartbeat,
    image_header_message,
    job_event,
)

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
HEARTBEAT_S = 10.0


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

    async def WatchJob(  # noqa: N802
        self, request: job_service_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.WatchJobResponse]:
        """Streams a job's events from any point until its last one."""
        job = self._find(request.job_id)
        sequence = request.after_sequence
        async for logged in job.log.follow(sequence, idle_s=HEARTBEAT_S):
            if logged is None:
                yield job_service_pb2.WatchJobResponse(event=heartbeat(sequence))
                continue
            sequence = logged.sequence
            if request.omit_image_bytes and isinstance(logged.event, ImageChunk):
                continue
            yield job_service_pb2.WatchJobResponse(event=job_event(logged))

    async def GetJob(  # noqa: N802
        self, request: job_service_pb2.GetJobRequest, context: Any
    ) -> job_service_pb2.GetJobResponse:
        """Tells how a job is."""
        return job_service_pb2.GetJobResponse(job=self._message(self._find(request.job_id)))

    async def ListJobs(  # noqa: N802
        self, request: job_service_pb2.ListJobsRequest, context: Any
    ) -> job_service_pb2.ListJobsResponse:
        """Lists the caller's jobs, newest first."""
        size = _page_size(request.page_size)
        after = _read_token(request.page_token) if request.page_token else None
        since = _time(request.created_after, "created_after") if request.HasField("created_after") else None
        found = []
        for job in self._engine.jobs.newest_first(current_caller().name):
            if after is not None and (job.created.timestamp(), job.id) >= after:
                continue
            if since is not None and job.created < since:
                break
            if request.states and _state(job) not in request.states:
                continue
            found.append(job)
            if len(found) > size:
                break
        page = found[:size]
        token = _page_token(page[-1]) if len(found) > size else ""
        return job_service_pb2.ListJobsResponse(jobs=[self._message(job) for job in page], next_page_token=token)

    async def CancelJob(  # noqa: N802
        self, request: job_service_pb2.CancelJobRequest, context: Any
    ) -> job_service_pb2.CancelJobResponse:
        """Stops a job."""
        job = self._find(request.job_id)
        self._engine.cancel(job, JobCancelled("the job was cancelled"))
        return job_service_pb2.CancelJobResponse(job=self._message(job))

    async def DeleteJob(  # noqa: N802
        self, request: job_service_pb2.DeleteJobRequest, context: Any
    ) -> job_service_pb2.DeleteJobResponse:
        """Forgets a job that ended."""
        _require_id(request.job_id)
        self._engine.jobs.delete(current_caller().name, request.job_id)
        return job_service_pb2.DeleteJobResponse()

    async def GetImage(  # noqa: N802
        self, request: job_service_pb2.GetImageRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.GetImageResponse]:
        """Streams one picture again."""
        job = self._find(request.job_id)
        header, chunks = _image(job, request.prompt_index)
        if request.offset_bytes > header.size_bytes:
            raise InvalidParameter(f"the image has {header.size_bytes} bytes", field="offset_bytes")
        yield job_service_pb2.GetImageResponse(image_header=image_header_message(header))
        for chunk in chunks:
            skipped = max(0, request.offset_bytes - chunk.offset_bytes)
            if skipped >= len(chunk.data):
                continue
            yield job_service_pb2.GetImageResponse(
                image_chunk=job_event_pb2.ImageChunk(
                    prompt_index=chunk.prompt_index,
                    offset_bytes=chunk.offset_bytes + skipped,
                    data=chunk.data[skipped:],
                )
            )

    def _find(self, job_id: str) -> Job:
        _require_id(job_id)
        return self._engine.jobs.get(current_caller().name, job_id)

    def _message(self, job: Job) -> job_service_pb2.Job:
        message = job_service_pb2.Job(
            job_id=job.id,
            request_id=job.plan.request_id or "",
            state=_state(job),
            create_time=_timestamp(job.created),
            plan=accepted_message(job.id, job.plan),
            last_sequence=job.log.last_sequence,
            queue_position=job.position if not job.log.closed and job.started is None else 0,
            done_steps=job.done_steps,
            total_steps=sum(prompt.sample_steps for prompt in job.plan.prompts),
            images=[image_header_message(header) for header in _headers(job)],
            attempt_count=int(job.started is not None),
        )
        if job.started is not None:
            message.start_time.CopyFrom(_timestamp(job.started))
        ending = job.log.ending
        if ending is not None:
            message.end_time.CopyFrom(_timestamp(ending.time))
            expires_s = self._engine.jobs.expires_in_s(job)
            if expires_s is not None:
                message.expire_time.CopyFrom(_timestamp(datetime.now(UTC) + timedelta(seconds=expires_s)))
            if isinstance(ending.event, Failed):
                message.failure.CopyFrom(failed_message(ending.event.error))
        return message


def _require_id(job_id: str) -> None:
    if not job_id:
        raise InvalidParameter("a job id is required", field="job_id")


def _state(job: Job) -> job_service_pb2.JobState.ValueType:
    ending = job.log.ending
    if ending is None:
        return job_service_pb2.JOB_STATE_QUEUED if job.started is None else job_service_pb2.JOB_STATE_RUNNING
    match ending.event:
        case Completed():
            return job_service_pb2.JOB_STATE_SUCCEEDED
        case Cancelled():
            return job_service_pb2.JOB_STATE_CANCELLED
        case _:
            return job_service_pb2.JOB_STATE_FAILED


def _headers(job: Job) -> Iterator[ImageHeader]:
    headers = (logged.event for logged in job.log.entries if isinstance(logged.event, ImageHeader))
    return iter(sorted(headers, key=lambda header: header.prompt_index))


def _image(job: Job, prompt_index: int) -> tuple[ImageHeader, list[ImageChunk]]:
    header = next((header for header in _headers(job) if header.prompt_index == prompt_index), None)
    chunks = [
        logged.event
        for logged in job.log.entries
        if isinstance(logged.event, ImageChunk) and logged.event.prompt_index == prompt_index
    ]
    if header is None or sum(len(chunk.data) for chunk in chunks) != header.size_bytes:
        raise ImageNotFound(
            f"the job has no image of prompt {prompt_index}" + ("" if job.log.closed else " yet"),
            field="prompt_index",
        )
    return header, chunks


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


def _page_token(last: Job) -> str:
    return base64.urlsafe_b64encode(json.dumps([last.created.timestamp(), last.id]).encode()).decode()


def _read_token(token: str) -> tuple[float, str]:
    try:
        created, job_id = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        return float(created), str(job_id)
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        raise InvalidParameter("not a token that this server gave", field="page_token") from None
