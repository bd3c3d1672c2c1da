"""A server that plays a script: what it is asked it remembers, what it answers the test decides."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_event_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    options_pb2,
)

Request = generation_service_pb2.GenerateRequest
JobEvent = job_event_pb2.JobEvent
Script = Callable[[Request, Any], Iterator[JobEvent]]
PATIENCE_S = 10.0
"""How long a test waits for what must happen at once."""


def png(seed: int = 0, size: tuple[int, int] = (32, 32), file_format: str = "PNG") -> bytes:
    """A small picture that differs for each seed."""
    file = io.BytesIO()
    Image.new("RGB", size, (seed % 256, 120, 30)).save(file, file_format)
    return file.getvalue()


class Story:
    """Builds the events of one job, numbering them."""

    def __init__(self) -> None:
        self.sequence = 0

    def __call__(self, **event: Message) -> JobEvent:
        self.sequence += 1
        message = JobEvent(sequence=self.sequence, **event)  # type: ignore[arg-type]
        message.time.FromJsonString("2026-01-02T03:04:05.250Z")
        return message

    def accepted(self, request: Request, **more: Any) -> JobEvent:
        prompts = [
            job_event_pb2.PlannedPrompt(
                prompt=prompt.prompt.replace("[trigger]", request.trigger_word),
                width=32,
                height=32,
                sample_steps=2,
                guidance_scale=4.0,
                seed=42 + index,
            )
            for index, prompt in enumerate(request.prompts)
        ]
        loras = [job_event_pb2.PlannedLora(path=lora.path, network_multiplier=0.5) for lora in request.loras]
        return self(
            accepted=job_event_pb2.Accepted(
                job_id="job-1",
                model=request.model,
                served_model="chroma-mini",
                profile="reference",
                noise_draw=options_pb2.NOISE_DRAW_FLOAT32,
                prompts=prompts,
                loras=loras,
                output=options_pb2.OutputOptions(format=options_pb2.IMAGE_FORMAT_PNG),
                **more,
            )
        )

    def queued(self, position: int, wait_s: int | None = None) -> JobEvent:
        message = self(queued=job_event_pb2.Queued(position=position))
        if wait_s is not None:
            message.queued.estimated_wait.FromSeconds(wait_s)
        return message

    def loading(self, fraction: float) -> JobEvent:
        return self(
            loading=job_event_pb2.Loading(
                stage=job_event_pb2.LOADING_STAGE_READING,
                fraction=fraction,
                done_bytes=int(1000 * fraction),
                total_bytes=1000,
            )
        )

    def prepared(self, request: Request, **more: Any) -> JobEvent:
        adapters = [
            job_event_pb2.AdapterReport(path=lora.path, sha256="ab" * 32, format="ai-toolkit", rank=16)
            for lora in request.loras
        ]
        return self(
            prepared=job_event_pb2.Prepared(
                adapters=adapters,
                model_revision="cd" * 32,
                token_counts=[job_event_pb2.TokenCount(used=5) for _ in request.prompts],
                versions={"torch": "2.13.0"},
                device="cpu",
                **more,
            )
        )

    def step(self, prompt_index: int, step: int, total_steps: int = 2) -> JobEvent:
        message = self(
            step=job_event_pb2.Step(
                prompt_index=prompt_index,
                step=step,
                total_steps=total_steps,
                sigma=1.0,
                timestep=1000.0,
                sigmas=[1.0, 0.5, 0.0] if step == 1 else [],
            )
        )
        message.step.duration.FromMilliseconds(250)
        message.step.estimated_remaining.FromMilliseconds(750)
        return message

    def preview(self, prompt_index: int, step: int) -> JobEvent:
        return self(
            preview=job_event_pb2.Preview(
                prompt_index=prompt_index, step=step, media_type="image/png", width=32, height=32, data=png(9)
            )
        )

    def header(self, data: bytes, prompt_index: int = 0, **more: Any) -> JobEvent:
        fields = {
            "prompt_index": prompt_index,
            "media_type": "image/png",
            "size_bytes": len(data),
            "width": 32,
            "height": 32,
            "sha256": hashlib.sha256(data).hexdigest(),
            "seed": 42 + prompt_index,
        }
        return self(image_header=job_event_pb2.ImageHeader(**(fields | more)))

    def chunk(self, data: bytes, offset_bytes: int = 0, prompt_index: int = 0) -> JobEvent:
        return self(
            image_chunk=job_event_pb2.ImageChunk(prompt_index=prompt_index, offset_bytes=offset_bytes, data=data)
        )

    def image(self, data: bytes, prompt_index: int = 0, chunk_bytes: int = 50) -> Iterator[JobEvent]:
        yield self.header(data, prompt_index)
        for start in range(0, len(data), chunk_bytes):
            yield self.chunk(data[start : start + chunk_bytes], start, prompt_index)

    def completed(self, image_count: int = 1) -> JobEvent:
        message = self(completed=job_event_pb2.Completed(peak_memory_bytes=123, image_count=image_count))
        message.completed.timings.total.FromMilliseconds(1500)
        return message

    def restarted(self, attempt: int, **more: Any) -> JobEvent:
        return self(restarted=job_event_pb2.Restarted(attempt=attempt, **more))

    def heartbeat(self) -> JobEvent:
        return JobEvent(sequence=self.sequence, heartbeat=job_event_pb2.Heartbeat())


def whole_job(request: Request, context: Any) -> Iterator[JobEvent]:
    """A job in which everything happens and nothing goes wrong."""
    story = Story()
    yield story.accepted(request)
    yield story.queued(2, wait_s=40)
    yield story.queued(1)
    yield story.loading(0.5)
    yield story.loading(1.0)
    yield story.heartbeat()
    yield story.prepared(request)
    for index in range(len(request.prompts)):
        for step in (1, 2):
            yield story.step(index, step)
            if request.preview.every_n_steps:
                yield story.preview(index, step)
        yield from story.image(png(index), index)
    yield story.completed(len(request.prompts))


def detailed_status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    domain: str = "chromarpc",
    metadata: dict[str, str] | None = None,
    violations: dict[str, str] | None = None,
    retry_after_s: float | None = None,
) -> status_pb2.Status:
    """A status with `google.rpc` details, as the server writes it."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})]
    if violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
        details.append(retry)
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def refusing(status: status_pb2.Status) -> Script:
    """A script that ends every call with a status."""

    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        abort(context, status)
        yield  # makes it a generator

    return script


def abort(context: Any, status: status_pb2.Status) -> None:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, status.message)


@dataclass
class FakeServer:
    """All the services; a test sets `script` and looks at what came in."""

    script: Script = whole_job
    health: int = health_pb2.HealthCheckResponse.SERVING
    requests: list[Request] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when a `Generate` call is over on the server's side, for whatever reason."""
    target: str = ""
    devices: list[model_service_pb2.Device] = field(
        default_factory=lambda: [
            model_service_pb2.Device(id="cpu", name="a CPU", memory_bytes=2**30, dtype="float32")
        ]
    )
    unavailable_because: str = ""

    def Generate(self, request: Request, context: Any) -> Iterator[generation_service_pb2.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.ended.set)
        for event in self.script(request, context):
            yield generation_service_pb2.GenerateResponse(event=event)

    def wait_for_end(self) -> Iterator[JobEvent]:
        """Part of a script: nothing more happens until the client goes away."""
        assert self.ended.wait(PATIENCE_S), "the client did not cancel"
        return
        yield

    def ListModels(self, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        models = [
            model_service_pb2.Model(
                id="chroma",
                description="Chroma1-Base",
                fetch_command="chromarpc-server fetch chroma",
                parts=[
                    model_service_pb2.ModelPart(part="transformer", source="org/chroma:chroma.gguf"),
                    model_service_pb2.ModelPart(
                        part="text_encoder", source="t5.gguf", present=True, stored_as="GGUF Q8_0"
                    ),
                    model_service_pb2.ModelPart(
                        part="autoencoder", source="ae.sft", present=True, problem="it has 4 latent channels"
                    ),
                ],
                base_name="lodestones/Chroma1-HD",
                defaults=model_service_pb2.ModelDefaults(width=1024, height=1024, sample_steps=25),
            ),
            model_service_pb2.Model(
                id="chroma-mini",
                weights_present=True,
                resident=True,
                resident_bytes=16 * 2**20,
                residences=[model_service_pb2.ModelResidence(device_id=one.id) for one in self.devices],
                resident_sets=[
                    model_service_pb2.ResidentSet(profile="exact", size_bytes=2**20, device_id=one.id)
                    for one in self.devices
                ],
            ),
        ]
        return model_service_pb2.ListModelsResponse(models=models)

    def GetServerInfo(self, request: Any, context: Any) -> model_service_pb2.GetServerInfoResponse:  # noqa: N802
        return model_service_pb2.GetServerInfoResponse(
            version="1.2.3",
            device=self.devices[0] if self.devices else None,
            devices=self.devices,
            unavailable_because=self.unavailable_because,
            profiles=[model_service_pb2.Profile(id="reference", description="the default")],
            default_profile="reference",
            limits=model_service_pb2.Limits(max_prompts=64, max_pixels=2**40),
        )

    def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        if request.service == "nothing":
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self.health)

    def Watch(self, request: Any, context: Any) -> Iterator[health_pb2.HealthCheckResponse]:  # noqa: N802
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        yield health_pb2.HealthCheckResponse(status=self.health)

    def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def add_services(self, server: grpc.Server) -> None:
        """For those that serve more."""

    def start(self) -> grpc.Server:
        server = grpc.server(futures.ThreadPoolExecutor(16))
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self, server)  # type: ignore[arg-type]
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, server)  # type: ignore[arg-type]
        health_pb2_grpc.add_HealthServicer_to_server(self, server)  # type: ignore[arg-type]
        self.add_services(server)
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        return server
