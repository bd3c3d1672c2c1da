"""Quotas: told by name and by when to try again, counted for each caller, given back when a call ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import chromarpc
from chromarpc.v1 import generation_service_pb2, generation_service_pb2_grpc, model_service_pb2
from chromarpc.v1.model_service_pb2_grpc import ModelServiceStub
from chromarpc_server.domain.errors import QueueFull, QuotaExceeded
from chromarpc_server.transport.access.quotas import MAX_OPEN_CALLS
from chromarpc_server.transport.messages.errors import rich_status
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
Serve = Callable[..., RunningServer]
Callers = Callable[..., Path]


def until_step(events: Any) -> None:
    assert any(isinstance(event, chromarpc.Step) for event in events)


def quota_of(error: grpc.RpcError) -> tuple[str, str, float | None]:
    """Subject and description of the quota, and the seconds to wait."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    failure, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    found = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    assert found["QuotaFailure"].Unpack(failure)
    waits = "RetryInfo" in found and found["RetryInfo"].Unpack(retry)
    (violation,) = failure.violations
    return (
        violation.subject,
        violation.description,
        retry.retry_delay.ToTimedelta().total_seconds() if waits else None,
    )


def test_calls_in_progress_are_counted_for_each_caller_and_given_back(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file(alice="max_streams = 1"))
    alice = (("authorization", f"Bearer {TOKENS['alice']}"),)
    with (
        grpc.insecure_channel(server.target) as channel,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        models = ModelServiceStub(channel)
        prompt = generation_service_pb2.Prompt(prompt="a", width=256, height=256, sample_steps=150)
        request = generation_service_pb2.GenerateRequest(model="chroma-mini", prompts=[prompt])
        stream = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(request, metadata=alice)
        next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=alice)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert quota_of(caught.value) == (
            "caller",
            "max_streams=1: you have 1 calls in progress, as many as you may",
            1.0,
        )
        assert bob.server_info().limits.max_streams == 1024
        stream.cancel()
        for _ in range(1000):
            try:
                limits = models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=alice).limits
                break
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert limits.max_streams == 1


def test_all_callers_together_have_a_bound_too(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file(), limits={"max_streams": 1})
    with (
        chromarpc.Client(server.target, token=TOKENS["alice"]) as alice,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        running = alice.generate("a", **LONG)
        next(running)
        with pytest.raises(chromarpc.QuotaExceeded) as caught:
            bob.server_info()
        assert caught.value.metadata == {"subject": "server", "quota": "max_streams", "limit": "1"}
        assert caught.value.retry_after_s == 1.0
        running.cancel()


def test_jobs_waiting_are_counted_for_each_caller(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file(alice="max_queued_jobs = 1"))
    with (
        chromarpc.Client(server.target, token=TOKENS["alice"]) as alice,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        running = bob.generate("a", **LONG)
        until_step(running)
        waiting = alice.generate("b", **SMALL)
        next(waiting)
        with pytest.raises(chromarpc.QuotaExceeded) as caught:
            list(alice.generate("c", **SMALL))
        assert caught.value.metadata == {"subject": "caller", "quota": "max_queued_jobs", "limit": "1"}
        assert caught.value.retry_after_s is not None
        others = bob.generate("d", **SMALL)
        next(others)
        running.cancel()
        assert type(list(waiting)[-1]).__name__ == type(list(others)[-1]).__name__ == "Completed"
        assert alice.server_info().limits.max_queued_jobs_per_caller == 1


def test_work_of_one_request_is_bounded_and_trying_again_does_not_help(
    serve: Serve, callers_file: Callers
) -> None:
    server = serve(callers=callers_file(alice=f"max_pixel_steps = {64 * 64 * 2}"))
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        assert alice.server_info().limits.max_pixel_steps == 64 * 64 * 2
        assert alice.generate_images("a", **{**SMALL, "sample_steps": 2})
        with pytest.raises(chromarpc.QuotaExceeded) as caught:
            list(alice.generate("a", **{**SMALL, "sample_steps": 3}))
        assert caught.value.metadata["quota"] == "max_pixel_steps"
        assert caught.value.retry_after_s is None


def test_bytes_of_uploads_are_bounded_for_each_caller(serve: Serve, callers_file: Callers, tmp_path: Path) -> None:
    server = serve(callers=callers_file(alice="max_upload_bytes = 10"))
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x" * 11)
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        with pytest.raises(chromarpc.QuotaExceeded) as caught:
            alice.upload_lora(file)
        assert caught.value.metadata == {"subject": "caller", "quota": "max_upload_bytes", "limit": "10"}
        assert alice.server_info().limits.max_uploads_bytes_per_caller == 10


async def test_watching_health_needs_no_token_and_uses_up_nothing_else(serve: Serve) -> None:
    server = serve()
    async with grpc.aio.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_OPEN_CALLS)]
        await asyncio.gather(*(watch.read() for watch in watches))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with chromarpc.AsyncClient(server.target) as client:
            assert await client.generate_images("a", **SMALL)
        for watch in watches:
            watch.cancel()


async def test_each_of_many_watchers_of_health_is_told_whoever_leaves(serve: Serve) -> None:
    server = serve(grace_s=5)
    async with grpc.aio.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        ready = [health.Watch(health_pb2.HealthCheckRequest(service="readiness")) for _ in range(3)]
        alive = health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert [(await watch.read()).status for watch in (*ready, alive)] == [serving] * 4
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        ready.pop().cancel()
        await asyncio.to_thread(server.stop)
        for watch in ready:
            assert (await watch.read()).status == not_serving
            assert await watch.read() is grpc.aio.EOF
        # Draining is no reason to be killed: only a lost device is.
        assert await alive.read() is grpc.aio.EOF


def test_metadata_beyond_its_bound_is_refused_and_a_large_message_too(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        models = ModelServiceStub(channel)
        models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=(("x", "y" * 8_000),))
        with pytest.raises(grpc.RpcError) as caught:
            models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=(("x", "y" * 40_000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call = channel.unary_unary("/chromarpc.v1.LoraService/AppendLoraUpload")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"x" * (9 * 2**20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert models.GetServerInfo(model_service_pb2.GetServerInfoRequest())


def test_a_full_queue_is_a_quota_as_well() -> None:
    error = QuotaExceeded.of("caller", "max_streams", 3, "x" * 1000, retry_after_s=2)
    status = rich_status(error)
    failure = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(failure) for detail in status.details)
    assert failure.violations[0].description.startswith("max_streams=3: xxx")
    assert len(failure.violations[0].description) < 450
    assert QueueFull("full").quota is None
