"""`JobService`: jobs that outlive their callers."""

from __future__ import annotations

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
)
from chromarpc_server.domain.resolve import Serving, is_request_id, resolve
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.jobs.job import AnyJob, DamagedJob
from chromarpc_server.jobs.redraw import Redraw
from chromarpc_server.jobs.registry import Selection, place
from chromarpc_server.transport.messages.events import encoded_event, heartbeat, image_header_message
from chromarpc_server.transport.messages.jobs import STATES, damaged_job_message, job_message
from chromarpc_server.transport.messages.paging import Page, page_token, token_place
from chromarpc_server.transport.messages.requests import generation_request
from chromarpc_server.transport.services.submit import submit

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
READ_AT_ONCE = 16
HEARTBEAT_S = 10.0
_STATES_BACK = {value: key for key, value in STATES.items()}


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
        # Nobody is attached to it, so nobody's leaving ends it.
        job, existed = await submit(self._engine, self._serving, request.request, detach=True)
        return job_service_pb2.CreateJobResponse(job=self._message(job), existed=existed)

    def violations(self, request: generation_service_pb2.GenerateRequest) -> tuple[FieldViolation, ...]:
        """What is wrong with a request, as far as its fields alone say; no job is made."""
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
        try:
            async for logged in job.log.follow(
                sequence, idle_s=HEARTBEAT_S, omit_image_bytes=request.omit_image_bytes
            ):
                if logged is None:
                    yield job_service_pb2.WatchJobResponse(event=heartbeat(sequence))
                    continue
                sequence = logged.sequence
                yield encoded_event(logged)
        finally:
            self._engine.unwatch(job)

    async def GetJob(  # noqa: N802
        self, request: job_service_pb2.GetJobRequest, context: Any
    ) -> job_service_pb2.GetJobResponse:
        """Answers how a job is."""
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
        page, last = Page(size), (0, "")
        answer = job_service_pb2.ListJobsResponse()
        while True:
            # A few at a time: a thousand of the largest would be gigabytes to read, and would not be sent.
            wanted = min(page.entries_left + 1, READ_AT_ONCE)
            found = await self._engine.jobs.page(current_caller().name, wanted, selection)
            for job in found:
                message = self._message(job)
                if not page.takes(message):
                    answer.next_page_token = page_token(last)
                    return answer
                answer.jobs.append(message)
                last = place(job)
            if len(found) < wanted:
                return answer
            selection = replace(selection, before=last)

    async def CancelJob(  # noqa: N802
        self, request: job_service_pb2.CancelJobRequest, context: Any
    ) -> job_service_pb2.CancelJobResponse:
        """Stops a job."""
        if request.job_id and request.request_id:
            raise InvalidParameter("name the job by its id or by its request's, not by both", field="request_id")
        if request.request_id:
            job = await self._engine.jobs.made_under(current_caller().name, request.request_id)
        else:
            job = await self._find(request.job_id)
        await self._engine.cancel_for_good(job, when_unattended=request.when_unattended)
        return job_service_pb2.CancelJobResponse(job=self._message(job))

    async def DeleteJob(  # noqa: N802
        self, request: job_service_pb2.DeleteJobRequest, context: Any
    ) -> job_service_pb2.DeleteJobResponse:
        """Forgets a job that ended."""
        _require_id(request.job_id)
        await self._engine.jobs.delete(current_caller().name, request.job_id)
        return job_service_pb2.DeleteJobResponse()

    async def RedrawJob(  # noqa: N802
        self, request: job_service_pb2.RedrawJobRequest, context: Any
    ) -> job_service_pb2.RedrawJobResponse:
        """Queues a job that draws one that ended again; answers once it is stored."""
        _require_id(request.job_id)
        if request.request_id and not is_request_id(request.request_id):
            raise InvalidParameter("not a UUID", field="request_id")
        redraw = Redraw(request.job_id, current_caller(), request.request_id or None)
        job, existed = await self._engine.redraw(redraw, self._serving)
        return job_service_pb2.RedrawJobResponse(job=self._message(job), existed=existed)

    async def GetImage(  # noqa: N802
        self, request: job_service_pb2.GetImageRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.GetImageResponse]:
        """Streams one image again."""
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
        # A damaged image is said to be so before anything of it is sent.
        chunks = job.log.image_chunks(index, request.offset_bytes)
        chunk = await anext(chunks, None)
        yield job_service_pb2.GetImageResponse(image_header=image_header_message(header))
        while chunk is not None:
            yield job_service_pb2.GetImageResponse(
                image_chunk=job_event_pb2.ImageChunk(
                    prompt_index=chunk.prompt_index, offset_bytes=chunk.offset_bytes, data=chunk.data
                )
            )
            chunk = await anext(chunks, None)

    async def _find(self, job_id: str) -> AnyJob:
        _require_id(job_id)
        return await self._engine.jobs.get(current_caller().name, job_id)

    def _message(self, job: AnyJob | DamagedJob) -> job_service_pb2.Job:
        if isinstance(job, DamagedJob):
            return damaged_job_message(job)
        return job_message(job, self._engine.jobs.expires(job))


def _require_id(job_id: str) -> None:
    if not job_id:
        raise InvalidParameter("a job id is required", field="job_id")


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


def _read_token(token: str) -> tuple[int, str]:
    found = token_place(token)
    if found is None or abs(found[0]) >= 2**63 or not found[1].isascii():
        raise InvalidParameter("not a token that this server gave", field="page_token")
    return found
