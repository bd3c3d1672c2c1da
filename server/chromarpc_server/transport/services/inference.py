"""`InferenceService`: the reference's HTTP API over the job API, for a gateway that transcodes it.

Asks the job service in this process as any other caller would; what it knows itself is the reference's JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import grpc
from google.api import httpbody_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.compat.v1 import inference_service_pb2, inference_service_pb2_grpc
from chromarpc.json_request import InvalidRequestJson, parse_request_json
from chromarpc.v1 import job_event_pb2, job_service_pb2, model_service_pb2, options_pb2
from chromarpc_server.domain.error_table import HttpErrorCode
from chromarpc_server.domain.errors import ChromaError, FieldViolation, first_named
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.transport.messages.errors import code_of
from chromarpc_server.transport.services.jobs import JobServicer
from chromarpc_server.transport.services.models import ModelServicer

STATUS_HEADER: Final = "chromarpc-http-status"
"""Names an answer's HTTP status to the gateway."""
BASE_URL_HEADER: Final = "chromarpc-base-url"
"""Where the gateway is reached, told by it; URLs are relative without."""
JSON_TYPE: Final = "application/json"
MAX_VIOLATIONS: Final = 100
"""How many an answer lists; the rest is a count."""

_STATES: Final[Mapping[int, str]] = {
    job_service_pb2.JOB_STATE_QUEUED: "in_queue",
    job_service_pb2.JOB_STATE_RUNNING: "in_progress",
    job_service_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    job_service_pb2.JOB_STATE_FAILED: "failed",
    job_service_pb2.JOB_STATE_CANCELLED: "canceled",
}
_HTTP_STATUS: Final[Mapping[grpc.StatusCode, int]] = {
    grpc.StatusCode.INVALID_ARGUMENT: 422,
    grpc.StatusCode.OUT_OF_RANGE: 422,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNAVAILABLE: 503,
}
_REASON_STATUS: Final[Mapping[str, int]] = {"MODEL_NOT_FOUND": 400, "LORA_NOT_FOUND": 400, "LORA_INVALID": 400}
"""Where the reference answers otherwise than the status code says."""
_TRANSFORMER: Final = re.compile(r"loras\.\d+\.transformer")
_JSON_CONTENT: Final = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)


class Refusal(Exception):
    """An answer that is an error, in the reference's shape."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Mapping[str, object],
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON."""
        error = {"code": self.code, "message": self.message, "details": self.details}
        return _json({"detail": {"error": error}})

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What the gateway is told beside it."""
        told: tuple[tuple[str, str], ...] = ((STATUS_HEADER, str(self.status)),)
        if self.retry_after_s is not None:
            told += (("retry-after", str(max(1, round(self.retry_after_s)))),)
        return told


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
        return await _answer(context, lambda caller: self._submit(request.body, caller))

    async def _submit(self, body: httpbody_pb2.HttpBody, caller: Any) -> dict[str, object]:
        if not _JSON_CONTENT.match(body.content_type):
            message = f"the body must be {JSON_TYPE}, got {body.content_type[:100] or 'no content type'}"
            raise Refusal(415, HttpErrorCode.UNSUPPORTED_MEDIA_TYPE, message, {})
        try:
            parsed = parse_request_json(body.data)
        except InvalidRequestJson as error:
            raise self._malformed(error) from None
        output = parsed.request.output
        if not parsed.request.HasField("output") or (output.HasField("picture_record") and not output.format):
            output.format = options_pb2.IMAGE_FORMAT_JPEG  # as the reference writes them
        try:
            created = await self._jobs.CreateJob(job_service_pb2.CreateJobRequest(request=parsed.request), caller)
        except ChromaError as error:
            raise _as_the_reference_says_it(_refusal(error), parsed.request) from None
        job = created.job
        at = f"{_base_url(caller)}/v1/requests/{job.job_id}"
        warnings = [
            {"code": WarningCode.UNKNOWN_FIELD, "field": name, "message": "no such field; it was left out"}
            for name in parsed.unknown
        ]
        return {
            "request_id": job.job_id,
            "status": "queued",
            "status_url": f"{at}/status",
            "result_url": f"{at}/result",
            "created_at": _time(job, "create_time"),
            "warnings": [*warnings, *_warnings(job.plan)],
        }

    def _malformed(self, error: InvalidRequestJson) -> Refusal:
        """What its types say against a body, and what the rest of it would be refused for."""
        found = [FieldViolation(path, message) for path, message in error.violations]
        if error.request is not None:
            wrong = [f"{violation.field}." for violation in found]
            found += [
                other
                for other in self._jobs.violations(error.request)
                # What could not be read is not missing besides.
                if not any(f"{other.field}.".startswith(at) or at.startswith(f"{other.field}.") for at in wrong)
            ]
        fields = first_named([violation.field for violation in found])
        message = str(error) if len(found) == 1 else f"invalid request: {fields}"
        return Refusal(422, "INVALID_PARAMETER", message, {"violations": _listed(found)})

    async def GetInferenceStatus(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceStatusRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Tells how far it is."""

        async def status(caller: Any) -> dict[str, object]:
            job = await self._job(request.request_id, caller)
            return {
                "request_id": job.job_id,
                "status": _STATES.get(job.state, "in_queue"),
                "created_at": _time(job, "create_time"),
                "started_at": _time(job, "start_time"),
                "finished_at": _time(job, "end_time"),
                "error": _failure(job),
                "detail": _failure_detail(job),
                "queue_position": job.queue_position or None,
                "done_steps": job.done_steps,
                "total_steps": job.total_steps,
            }

        return await _answer(context, status)

    async def GetInferenceResult(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceResultRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Tells what came of it; `outputs` is null until it succeeded."""

        async def result(caller: Any) -> dict[str, object]:
            job = await self._job(request.request_id, caller)
            at = f"{_base_url(caller)}/v1/requests/{job.job_id}/images"
            is_done = job.state == job_service_pb2.JOB_STATE_SUCCEEDED
            images = [_image(image, f"{at}/{image.prompt_index}") for image in job.images]
            return {
                "request_id": job.job_id,
                "status": _STATES.get(job.state, "in_queue"),
                "outputs": {"images": images, "videos": []} if is_done else None,
                "error": _failure(job),
                "detail": _failure_detail(job),
                "created_at": _time(job, "create_time"),
                "finished_at": _time(job, "end_time"),
                "metadata": _metadata(job) if is_done else None,
            }

        return await _answer(context, result)

    async def DownloadInferenceImage(  # noqa: N802
        self, request: inference_service_pb2.DownloadInferenceImageRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Streams an image's bytes; the first part names their type."""
        index = request.prompt_index
        try:
            wanted = job_service_pb2.GetImageRequest(job_id=request.request_id, prompt_index=_index(index))
            media_type = ""
            async for part in self._jobs.GetImage(wanted, context):
                if part.HasField("image_header"):
                    media_type = part.image_header.media_type
                    name = f"{request.request_id}_{index}.{media_type.removeprefix('image/')}"
                    disposition = ("content-disposition", f'inline; filename="{name}"')
                    await context.send_initial_metadata((disposition, ("cache-control", "private, max-age=3600")))
                else:
                    yield httpbody_pb2.HttpBody(content_type=media_type, data=part.image_chunk.data)
        except (ChromaError, Refusal) as error:
            refusal = _request_not_found(_refusal(error), request.request_id)
            await context.send_initial_metadata(refusal.headers())
            yield httpbody_pb2.HttpBody(content_type=JSON_TYPE, data=refusal.body())

    async def ListInferenceModels(  # noqa: N802
        self, request: inference_service_pb2.ListInferenceModelsRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Lists the models."""

        async def models(caller: Any) -> dict[str, object]:
            listed = await self._models.ListModels(model_service_pb2.ListModelsRequest(), caller)
            return {"models": [_model(model) for model in listed.models]}

        return await _answer(context, models)

    async def GetInferenceHealth(  # noqa: N802
        self, request: inference_service_pb2.GetInferenceHealthRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        """Whoever reads this is served: the gateway itself answers 503 while the server takes no requests."""

        async def health(_caller: Any) -> dict[str, object]:
            return {"status": "healthy"}

        return await _answer(context, health)

    async def _job(self, job_id: str, caller: Any) -> job_service_pb2.Job:
        try:
            found = await self._jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), caller)
        except ChromaError as error:
            raise _request_not_found(_refusal(error), job_id) from None
        return found.job


async def _answer(context: Any, answer: Callable[[Any], Awaitable[dict[str, object]]]) -> httpbody_pb2.HttpBody:
    try:
        body = _json(await answer(context))
    except (ChromaError, Refusal) as error:
        refusal = _refusal(error)
        await context.send_initial_metadata(refusal.headers())
        body = refusal.body()
    return httpbody_pb2.HttpBody(content_type=JSON_TYPE, data=body)


def _refusal(error: ChromaError | Refusal) -> Refusal:
    """An error as HTTP tells it."""
    if isinstance(error, Refusal):
        return error
    details: dict[str, object] = dict(error.metadata)
    if error.violations:
        details["violations"] = _listed(error.violations)
    status = _http_status(error.reason, code_of(error))
    return Refusal(status, error.reason, error.message, details, error.retry_after_s)


def _http_status(reason: str, code: grpc.StatusCode) -> int:
    return _REASON_STATUS.get(reason, _HTTP_STATUS.get(code, 500))


def _listed(violations: Iterable[Any]) -> list[dict[str, str]]:
    """Violations of an error or of a message, as JSON has them."""
    shown = [{"field": violation.field, "description": violation.description} for violation in violations]
    rest = len(shown) - MAX_VIOLATIONS
    return [*shown[:MAX_VIOLATIONS], {"field": "", "description": f"and {rest} more"}] if rest > 0 else shown


def _as_the_reference_says_it(refusal: Refusal, request: Any) -> Refusal:
    fields = [violation["field"] for violation in _violations(refusal)]
    if refusal.code == "MODEL_NOT_FOUND":
        models = str(refusal.details.get("models", "")).split(",")
        return Refusal(400, refusal.code, refusal.message, {"supported_models": models})
    if refusal.code == "LORA_NOT_FOUND":
        index = next((int(part) for field in fields for part in field.split(".") if part.isdecimal()), 0)
        path = request.loras[index].path if index < len(request.loras) else ""
        return Refusal(400, refusal.code, refusal.message, {"lora_path": path})
    if fields and all(map(_TRANSFORMER.fullmatch, fields)):
        named = [lora.transformer for lora in request.loras if lora.HasField("transformer")]
        if all(name in ("low", "high") for name in named):
            return Refusal(400, HttpErrorCode.MOE_FORMAT_NOT_SUPPORTED, refusal.message, refusal.details)
    return refusal


def _violations(refusal: Refusal) -> list[dict[str, str]]:
    found = refusal.details.get("violations", [])
    return found if isinstance(found, list) else []


def _request_not_found(refusal: Refusal, request_id: str) -> Refusal:
    """The reference calls a job a request; an id that can be no job's is just not found."""
    if refusal.status not in (404, 422):
        return refusal
    return Refusal(404, HttpErrorCode.REQUEST_NOT_FOUND, refusal.message, {"request_id": request_id[:100]})


def _index(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) < 7):
        raise Refusal(404, HttpErrorCode.REQUEST_NOT_FOUND, f"no image has the index {text[:32]!r}", {})
    return int(text)


def _image(image: job_event_pb2.ImageHeader, url: str) -> dict[str, object]:
    return {
        "format": image.media_type.removeprefix("image/"),
        "width": image.width,
        "height": image.height,
        "url": url,
        "seed": image.seed,
        "size_bytes": image.size_bytes,
        "sha256": image.sha256,
    }


def _model(model: model_service_pb2.Model) -> dict[str, object]:
    return {
        "id": model.id,
        "base_model": model.base_checkpoint,
        "resolution_divisor": model.resolution_divisor,
        "default_steps": model.defaults.sample_steps,
        "default_guidance_scale": model.defaults.guidance_scale,
        "requires_control_image": False,
        "is_video_model": False,
        "default_num_frames": None,
        "default_fps": None,
    }


def _metadata(job: job_service_pb2.Job) -> dict[str, object]:
    start, end = job.start_time.ToMilliseconds(), job.end_time.ToMilliseconds()
    return {
        "model": job.plan.model,
        "inference_time": (end - start) / 1000,
        "timings": {
            "queued": (start - job.create_time.ToMilliseconds()) / 1000,
            "total": (end - job.create_time.ToMilliseconds()) / 1000,
        },
        "warnings": _warnings(job.plan),
    }


def _warnings(plan: job_event_pb2.Accepted) -> list[dict[str, str]]:
    return [{"code": w.code, "field": w.field, "message": w.message} for w in plan.warnings]


def _failure(job: job_service_pb2.Job) -> str | None:
    return job.failure.message if job.state == job_service_pb2.JOB_STATE_FAILED else None


def _failure_detail(job: job_service_pb2.Job) -> dict[str, object] | None:
    """Why a job failed, in the shape of an answer that is an error: scripts read both alike."""
    if job.state != job_service_pb2.JOB_STATE_FAILED:
        return None
    failure = job.failure
    code = next((code for code in grpc.StatusCode if code.value[0] == failure.code), grpc.StatusCode.UNKNOWN)
    details: dict[str, object] = {
        **failure.metadata,
        "grpc_status": code.name,
        "http_status": _http_status(failure.reason, code),
    }
    if failure.violations:
        details["violations"] = _listed(failure.violations)
    if failure.HasField("retry_after"):
        details["retry_after_s"] = failure.retry_after.ToMilliseconds() / 1000
    return {"error": {"code": failure.reason, "message": failure.message, "details": details}}


def _time(job: job_service_pb2.Job, name: str) -> str | None:
    if not job.HasField(name):  # type: ignore[arg-type]
        return None
    time: Timestamp = getattr(job, name)
    return time.ToJsonString()


def _base_url(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == BASE_URL_HEADER:
            return str(value).rstrip("/")
    return ""


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
