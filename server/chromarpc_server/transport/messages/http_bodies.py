"""The JSON bodies of the reference's HTTP API, made of this service's own messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.v1 import job_event_pb2, job_service_pb2, model_service_pb2
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.transport.messages.http_errors import http_status, listed

Body = dict[str, object]

_STATES: Final[Mapping[int, str]] = {
    job_service_pb2.JOB_STATE_QUEUED: "in_queue",
    job_service_pb2.JOB_STATE_RUNNING: "in_progress",
    job_service_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    job_service_pb2.JOB_STATE_FAILED: "failed",
    job_service_pb2.JOB_STATE_CANCELLED: "canceled",
}


def submitted_body(job: job_service_pb2.Job, base_url: str, unknown_keys: Iterable[str]) -> Body:
    """A request that was queued; `unknown_keys`: those of its body that were left out."""
    at = f"{base_url}/v1/requests/{job.job_id}"
    warnings = [
        {"code": WarningCode.UNKNOWN_FIELD, "field": name, "message": "no such field; it was left out"}
        for name in unknown_keys
    ]
    return {
        "request_id": job.job_id,
        "status": "queued",
        "status_url": f"{at}/status",
        "result_url": f"{at}/result",
        "created_at": _time(job, "create_time"),
        "warnings": [*warnings, *_warnings(job.plan)],
    }


def status_body(job: job_service_pb2.Job) -> Body:
    """How far a request is."""
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


def result_body(job: job_service_pb2.Job, base_url: str) -> Body:
    """What came of a request; `outputs` is null until it succeeded."""
    at = f"{base_url}/v1/requests/{job.job_id}/images"
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


def models_body(models: Iterable[model_service_pb2.Model]) -> Body:
    """The models that are served."""
    return {"models": [_model(model) for model in models]}


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
        "http_status": http_status(failure.reason),
    }
    if failure.violations:
        details["violations"] = listed(failure.violations)
    if failure.HasField("retry_after"):
        details["retry_after_s"] = failure.retry_after.ToMilliseconds() / 1000
    return {"error": {"code": failure.reason, "message": failure.message, "details": details}}


def _time(job: job_service_pb2.Job, name: str) -> str | None:
    if not job.HasField(name):  # type: ignore[arg-type]
        return None
    time: Timestamp = getattr(job, name)
    return time.ToJsonString()
