"""Traces of a real server: a call and its job are one trace, with a span for every stage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

import chromarpc
from chromarpc.v1 import generation_service_pb2, generation_service_pb2_grpc
from chromarpc_server import app as app_module
from chromarpc_server.domain.events import (
    Accepted,
    Completed,
    Prepared,
    Queued,
    Restarted,
    Timings,
    WeightsReport,
    WeightsSource,
)
from chromarpc_server.observability.tracing import Tracing
from chromarpc_server.runtime.work import StageDone
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
PREPARED = Prepared((), "ab" * 32, (), {}, "NVIDIA H100", WeightsReport(WeightsSource.BUILT, 0, 0.0, 1, 1), ())
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Any) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


@pytest.fixture
def traced(serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch) -> tuple[RunningServer, Kept]:
    kept = Kept()
    monkeypatch.setattr(app_module, "Tracing", lambda *, version: Tracing(version=version, exporter=kept))
    return serve(traces=True), kept


def test_a_call_and_its_job_are_one_trace(traced: tuple[RunningServer, Kept]) -> None:
    server, kept = traced
    prompts = [
        generation_service_pb2.Prompt(prompt=f"planted {index}", width=64, height=64, sample_steps=2)
        for index in range(2)
    ]
    request = generation_service_pb2.GenerateRequest(model="chroma-mini", prompts=prompts, hf_token="hf_planted")
    with grpc.insecure_channel(server.target) as channel:
        list(
            generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(
                request, metadata=(("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("x-secret", "planted"))
            )
        )
    server.stop()
    assert {f"{span.context.trace_id:032x}" for span in kept.spans if span.context} == {TRACE_ID}
    by_name: dict[str, list[ReadableSpan]] = {}
    for span in kept.spans:
        by_name.setdefault(span.name, []).append(span)
    assert {name: len(spans) for name, spans in by_name.items()} == {
        "/chromarpc.v1.GenerationService/Generate": 1,
        "job": 1,
        "queue": 1,
        "load": 1,
        "encode": 2,
        "steps": 2,
        "decode": 2,
    }
    (call,), (job,) = by_name["/chromarpc.v1.GenerationService/Generate"], by_name["job"]
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT_ID
    assert job.parent is not None
    assert call.context is not None
    assert job.parent.span_id == call.context.span_id
    assert job.attributes is not None
    assert job.attributes["chromarpc.images"] == 2
    stages = [span for name in ("queue", "load", "encode", "steps", "decode") for span in by_name[name]]
    assert all(span.parent is not None and span.parent.span_id == job.context.span_id for span in stages)
    assert [span.attributes["chromarpc.prompt_index"] for span in by_name["steps"]] == [0, 1]
    ends = sorted((span.start_time, span.end_time, span.name) for span in stages)
    assert [name for _, _, name in ends] == ["queue", "load", *["encode", "steps", "decode"] * 2]
    assert job.resource.attributes["service.name"] == "chromarpc"
    assert "planted" not in "".join(span.to_json() for span in kept.spans)


def test_a_failed_job_and_a_refused_call_say_so(traced: tuple[RunningServer, Kept]) -> None:
    server, kept = traced
    with chromarpc.Client(server.target) as client:
        client.health()
        with pytest.raises(chromarpc.ModelNotFound):
            list(client.generate("a", model="nothing"))
        running = client.generate("a", **{**SMALL, "width": 256, "height": 256, "sample_steps": 150})
        assert any(isinstance(event, chromarpc.Step) for event in running)
        running.cancel()
        client.generate_images("a", **SMALL)
    server.stop()
    assert not any("health" in span.name.lower() for span in kept.spans)
    codes = [
        span.attributes["rpc.grpc.status_code"]
        for span in kept.spans
        if span.attributes and "rpc.grpc.status_code" in span.attributes
    ]
    assert grpc.StatusCode.NOT_FOUND.value[0] in codes
    (cancelled,) = [
        span for span in kept.spans if span.name == "job" and span.attributes and "error.type" in span.attributes
    ]
    assert cancelled.attributes is not None
    assert cancelled.attributes["error.type"] == "CANCELLED"


def test_a_job_that_another_process_will_go_on_with_is_not_left_out(traced: tuple[RunningServer, Kept]) -> None:
    server, kept = traced
    with chromarpc.Client(server.target) as client:
        running = client.create_job("a", **{**SMALL, "width": 256, "height": 256, "sample_steps": 150})
        assert any(isinstance(event, chromarpc.Step) for event in client.watch_job(running.job_id))
    assert server.stop() == 0
    (job,) = [span for span in kept.spans if span.name == "job"]
    assert job.attributes is not None
    assert (job.attributes["chromarpc.job_id"], job.attributes["error.type"]) == (running.job_id, "DRAINING")


def test_without_the_extra_the_start_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from chromarpc_server.__main__ import main\n"
        "main(['--traces', '--port', '0', '--device', 'cpu'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "chromarpc[server,otel]"' in done.stderr


def test_a_job_that_moves_says_from_where_and_waits_twice() -> None:
    kept = Kept()
    tracing = Tracing(version="1", exporter=kept)
    plan: Any = SimpleNamespace(served_model="chroma", profile="exact", prompts=["a"], loras=[], pixel_steps=1)
    job: Any = SimpleNamespace(id="a job", plan=plan, device_id="", started_at=None)

    def begin(device_id: str) -> None:
        job.device_id, job.started_at = device_id, time.monotonic()
        tracing.observer.on_event(job, replace(PREPARED, device_id=device_id))
        tracing.observer.on_stage(job, StageDone("denoising_s", 0.0, time.time_ns(), 0))

    tracing.observer.on_event(job, Accepted("a job", plan))
    begin("cuda:0")
    job.started_at = None
    tracing.observer.on_event(job, Restarted(2, moved_from="cuda:0"))
    tracing.observer.on_event(job, Queued(1, None))
    begin("cuda:2")
    tracing.observer.on_event(job, Completed(Timings(), 1, 1))
    tracing.close()
    attributes = [(span.name, (span.attributes or {}).get("chromarpc.device_id")) for span in kept.spans]
    assert attributes == [
        ("queue", None),
        ("steps", "cuda:0"),
        ("queue", None),
        ("steps", "cuda:2"),
        ("job", "cuda:2"),
    ]
    (event,) = kept.spans[-1].events
    assert event.name == "restarted"
    assert dict(event.attributes or {}) == {"chromarpc.device_id": "cuda:0", "chromarpc.attempt": 2}
    first, second = (span for span in kept.spans if span.name == "queue")
    assert (second.start_time or 0) >= (first.end_time or 0)


def test_a_job_of_a_pair_names_the_other_card_too() -> None:
    kept = Kept()
    tracing = Tracing(version="1", exporter=kept)
    plan: Any = SimpleNamespace(served_model="chroma", profile="exact", prompts=["a"], loras=[], pixel_steps=1)
    job: Any = SimpleNamespace(id="a job", plan=plan, device_id="cuda:0+cuda:1", started_at=time.monotonic())
    tracing.observer.on_event(job, Accepted("a job", plan))
    tracing.observer.on_event(job, replace(PREPARED, device_id="cuda:0+cuda:1", second_device="cuda:1"))
    tracing.observer.on_event(job, Completed(Timings(), 1, 1))
    tracing.close()
    told = kept.spans[-1].attributes or {}
    assert (told["chromarpc.device_id"], told["chromarpc.second_device"]) == ("cuda:0+cuda:1", "cuda:1")
