"""OpenTelemetry traces: each call by the standard gRPC instrumentation, each job with its stages.

Needs the extra `chromarpc[otel]`. Where spans go is said by OpenTelemetry's own variables, such as
OTEL_EXPORTER_OTLP_ENDPOINT. Spans hold no prompts and no tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chromarpc_server.domain.errors import Draining
from chromarpc_server.domain.events import Accepted, Cancelled, Completed, Event, Failed, Prepared, Restarted
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.runtime.work import StageDone

if TYPE_CHECKING:
    import grpc
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

SPAN_NAMES = {"loading_s": "load", "text_encoding_s": "encode", "denoising_s": "steps", "decoding_s": "decode"}
"""What the spans of a job's stages are called."""
DEVICE_ID = "chromarpc.device_id"
"""The attribute of a job and of its stages that says which device; of a job that moved, the last one."""


@dataclass
class _JobSpan:
    span: Any
    queued_ns: int
    """When it began to wait: once it was admitted, or its device was lost."""
    has_queue_span: bool = False


class Tracing:
    """Makes spans and sends them off in the background."""

    def __init__(self, *, version: str, exporter: SpanExporter | None = None) -> None:
        """Starts the exporter.

        Args:
            version: of chromarpc.
            exporter: where spans go; by default OTLP over gRPC.

        Raises:
            ValueError: the extra is not installed.
        """
        try:
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                    OTLPSpanExporter,
                )

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise ValueError(f'--traces needs the extra: pip install "chromarpc[server,otel]" ({error})') from None
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
        resource = Resource.create({"service.version": version})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "chromarpc"}))
        self._provider: TracerProvider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("chromarpc_server", version)
        self._jobs: dict[str, _JobSpan] = {}

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """The standard instrumentation, for every call but those of health."""
        from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters  # noqa: PLC0415 - an extra

        interceptor: grpc.aio.ServerInterceptor = aio_server_interceptor(  # type: ignore[no-untyped-call]
            tracer_provider=self._provider, filter_=filters.negate(filters.health_check())
        )
        return interceptor

    @property
    def observer(self) -> JobObserver:
        """For the engine."""
        return JobObserver(event=self._event, stage=self._stage)

    def close(self) -> None:
        """Sends what is left; jobs that another process will go on with end here as they are."""
        for kept in self._jobs.values():
            kept.span.set_attribute("error.type", Draining.reason)
            kept.span.end()
        self._jobs.clear()
        self._provider.shutdown()

    def _event(self, job: Job, event: Event) -> None:
        if isinstance(event, Accepted):
            now = time.time_ns()
            attributes: dict[str, str | int] = {
                "chromarpc.job_id": job.id,
                "chromarpc.model": job.plan.served_model,
                "chromarpc.profile": job.plan.profile,
                "chromarpc.images": len(job.plan.prompts),
                "chromarpc.adapters": len(job.plan.loras),
                "chromarpc.pixel_steps": job.plan.pixel_steps,
            }
            span = self._tracer.start_span("job", start_time=now, attributes=attributes)
            self._jobs[job.id] = _JobSpan(span, now)
            return
        kept = self._jobs.get(job.id)
        if kept is None:
            return
        if isinstance(event, Restarted):
            if event.moved_from:
                kept.span.add_event("restarted", {DEVICE_ID: event.moved_from, "chromarpc.attempt": event.attempt})
            kept.queued_ns, kept.has_queue_span = time.time_ns(), False
            return
        self._end_queue_span(job, kept)
        if isinstance(event, Prepared) and event.second_device:
            kept.span.set_attribute("chromarpc.second_device", event.second_device)
        if isinstance(event, Completed | Failed | Cancelled):
            del self._jobs[job.id]
            if not isinstance(event, Completed):
                kept.span.set_attribute("error.type", event.error.reason)
            if isinstance(event, Failed):
                from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - an extra

                kept.span.set_status(Status(StatusCode.ERROR, event.error.reason))
            kept.span.end()

    def _stage(self, job: Job, done: StageDone) -> None:
        kept = self._jobs.get(job.id)
        if kept is not None and done.stage in SPAN_NAMES:
            self._end_queue_span(job, kept)
            attributes: dict[str, str | int] = {DEVICE_ID: job.device_id}
            if done.prompt_index is not None:
                attributes["chromarpc.prompt_index"] = done.prompt_index
            started_ns = done.ended_ns - round(done.seconds * 1e9)
            self._child(kept, SPAN_NAMES[done.stage], started_ns, done.ended_ns, attributes)

    def _end_queue_span(self, job: Job, kept: _JobSpan) -> None:
        if kept.has_queue_span or job.started_at is None:
            return
        kept.has_queue_span = True
        kept.span.set_attribute(DEVICE_ID, job.device_id)
        ran_ns = round((time.monotonic() - job.started_at) * 1e9)
        self._child(kept, "queue", kept.queued_ns, max(kept.queued_ns, time.time_ns() - ran_ns), {})

    def _child(
        self, kept: _JobSpan, name: str, started_ns: int, ended_ns: int, attributes: dict[str, str | int]
    ) -> None:
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - an extra

        within = set_span_in_context(kept.span)
        span = self._tracer.start_span(name, context=within, start_time=started_ns, attributes=attributes)
        span.end(end_time=ended_ns)
