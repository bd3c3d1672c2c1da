"""`InferenceService`: the reference's HTTP API over the job API, for a gateway that transcodes it.

Asks the job service in this process as any other caller would. What the reference's JSON looks like is known by
`messages/http_bodies.py` and `messages/http_errors.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final

from google.api import httpbody_pb2

from chromarpc.compat.v1 import inference_service_pb2, inference_service_pb2_grpc
from chromarpc.json_request import InvalidRequestJson, parse_request_json
from chromarpc.v1 import job_service_pb2, model_service_pb2, options_pb2
from chromarpc_server.domain.error_table import HttpErrorCode
from chromarpc_server.domain.errors import ChromaError, FieldViolation
from chromarpc_server.transport.messages.http_bodies import (
    Body,
    models_body,
    result_body,
    status_body,
    submitted_body,
)
from chromarpc_server.transport.messages.http_errors import (
    HttpError,
    malformed,
    request_error,
    submission_error,
)
from chromarpc_server.transport.services.jobs import JobServicer
from chromarpc_server.transport.services.models import ModelServicer

BASE_URL_HEADER: Final = "chromarpc-base-url"
"""Where the gateway is reached, as it says; URLs are relative without."""
JSON_TYPE: Final = "application/json"

_JSON_CONTENT: Final = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers with HTTP bodies."""

    def __init__(self, jobs: JobServicer, models: ModelServicer) -> None:
        """`jobs`, `models`: the services that are asked."""
        self._jobs = jobs
        self._models = models

    async def SubmitInference(  # noqa: N802
        self, request: inference_service_pb2.SubmitInferenceRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Queues a generation."""
        return await _answer(context, self._submit(request.body, context))

    async def _submit(self, body: httpbody_pb2.HttpBody, context: Any) -> Body:
        if not _JSON_CONTENT.match(body.content_type):
            message = f"the body must be {JSON_TYPE}, got {body.content_type[:100] or 'no content type'}"
            raise HttpError.by(HttpErrorCode.UNSUPPORTED_MEDIA_TYPE, message)
        try:
            parsed = parse_request_json(body.data)
        except InvalidRequestJson as error:
            raise malformed(str(error), self._violations(error)) from None
        output = parsed.request.output
        if not parsed.request.HasField("output") or (output.HasField("picture_record") and not output.format):
            output.format = options_pb2.IMAGE_FORMAT_JPEG  # as the reference writes them
        try:
            created = await self._jobs.CreateJob(job_service_pb2.CreateJobRequest(request=parsed.request), context)
        except ChromaError as error:
            raise submission_error(error, parsed.request) from None
        return submitted_body(created.job, _base_url(context), parsed.unknown)

    def _violations(self, error: InvalidRequestJson) -> list[FieldViolation]:
        """What is wrong with the types of a body, and with the rest of it, as far as that could be read."""
        found = [FieldViolation(path, message) for path, message in error.violations]
        if error.request is None:
            return found
        wrong = [f"{violation.field}." for violation in found]
        return found + [
            other
            for other in self._jobs.violations(error.request)
            # What could not be read is not missing besides.
            if not any(f"{other.field}.".startswith(at) or at.startswith(f"{other.field}.") for at in wrong)
        ]

    async def GetInferenceStatus(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceStatusRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Answers how far a request is."""

        async def status() -> Body:
            return status_body(await self._job(request.request_id, context))

        return await _answer(context, status())

    async def GetInferenceResult(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceResultRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Answers what came of a request."""

        async def result() -> Body:
            return result_body(await self._job(request.request_id, context), _base_url(context))

        return await _answer(context, result())

    async def DownloadInferenceImage(  # noqa: N802
        self, request: inference_service_pb2.DownloadInferenceImageRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Streams an image's bytes; the first part names their type."""
        request_id, index = request.request_id, request.prompt_index
        try:
            wanted = job_service_pb2.GetImageRequest(job_id=request_id, prompt_index=_index(index, request_id))
            media_type = ""
            async for part in self._jobs.GetImage(wanted, context):
                if part.HasField("image_header"):
                    media_type = part.image_header.media_type
                    name = f"{request_id}_{index}.{media_type.removeprefix('image/')}"
                    disposition = ("content-disposition", f'inline; filename="{name}"')
                    await context.send_initial_metadata((disposition, ("cache-control", "private, max-age=3600")))
                else:
                    yield httpbody_pb2.HttpBody(content_type=media_type, data=part.image_chunk.data)
        except (ChromaError, HttpError) as error:
            answer = error if isinstance(error, HttpError) else request_error(error, request_id)
            await context.send_initial_metadata(answer.headers())
            yield httpbody_pb2.HttpBody(content_type=JSON_TYPE, data=answer.body())

    async def ListInferenceModels(  # noqa: N802
        self, request: inference_service_pb2.ListInferenceModelsRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Lists the models."""

        async def models() -> Body:
            listed = await self._models.ListModels(model_service_pb2.ListModelsRequest(), context)
            return models_body(listed.models)

        return await _answer(context, models())

    async def GetInferenceHealth(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceHealthRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Whoever reads this is served: the gateway itself answers 503 while the server takes no requests."""

        async def health() -> Body:
            return {"status": "healthy"}

        return await _answer(context, health())

    async def _job(self, job_id: str, context: Any) -> job_service_pb2.Job:
        try:
            found = await self._jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), context)
        except ChromaError as error:
            raise request_error(error, job_id) from None
        return found.job


async def _answer(context: Any, body: Awaitable[Body]) -> httpbody_pb2.HttpBody:
    """The body, or the error that came instead of it."""
    try:
        data = json.dumps(await body, ensure_ascii=False).encode()
    except (ChromaError, HttpError) as error:
        answer = error if isinstance(error, HttpError) else HttpError.of(error)
        await context.send_initial_metadata(answer.headers())
        data = answer.body()
    return httpbody_pb2.HttpBody(content_type=JSON_TYPE, data=data)


def _index(text: str, request_id: str) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) < 7):
        message = f"no image has the index {text[:32]!r}"
        raise HttpError.by(HttpErrorCode.REQUEST_NOT_FOUND, message, {"request_id": request_id[:100]})
    return int(text)


def _base_url(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == BASE_URL_HEADER:
            return str(value).rstrip("/")
    return ""
