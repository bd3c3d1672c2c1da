"""Every field of every request, through a real channel: no INTERNAL, no hang, no growth of memory."""

from __future__ import annotations

import base64
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chromarpc
from chromarpc.v1 import generation_service_pb2
from chromarpc_server.domain import errors
from chromarpc_server.pipeline import used_memory_bytes
from chromarpc_server.transport.messages.errors import CODES, MAX_DETAILS_BYTES
from chromarpc_server.transport.server import SERVICES
from tests.conftest import RunningServer, start_server
from tests.security.fields import damaged, messages

TIMEOUT_S = 60.0
SERVED = {
    grpc.StatusCode.OK,
    *(code for kind, code in CODES.items() if kind not in (errors.InternalError, errors.DeviceLost)),
}
METHODS = [(service, method) for service in SERVICES for method in service.methods]
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def fuzzed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server where whatever is a valid request is quickly done."""
    running = start_server(
        model_folder={"chroma-mini": tiny_checkpoint},
        lora_root=tmp_path_factory.mktemp("loras"),
        data_dir=tmp_path_factory.mktemp("data"),
        lora_hosts=["adapters.invalid"],
        grace_s=0,
        preload=["chroma-mini"],
        limits={"max_pixel_steps": 64 * 64 * 8, "max_prompts": 4},
        metrics_port=0,
    )
    yield running
    running.stop()


def call(channel: grpc.Channel, service: Any, method: Any, data: bytes) -> grpc.StatusCode:
    """Makes one call to its end; checks what is told of an error."""
    path = f"/{service.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type).FromString
    try:
        if method.server_streaming:
            for _ in channel.unary_stream(path, response_deserializer=answer)(data, timeout=TIMEOUT_S):
                pass
        else:
            channel.unary_unary(path, response_deserializer=answer)(data, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        assert code in SERVED, f"{path}: {code} {error.details()}"
        details = dict(error.trailing_metadata())["grpc-status-details-bin"]
        assert len(details) <= MAX_DETAILS_BYTES
        reason = error_details_pb2.ErrorInfo()
        assert status_pb2.Status.FromString(details).details[0].Unpack(reason)
        assert reason.reason in {kind.reason for kind in CODES}
        return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("service", "method"), METHODS, ids=[method.name for _, method in METHODS])
def test_any_value_in_any_field(fuzzed: RunningServer, service: Any, method: Any) -> None:
    with grpc.insecure_channel(fuzzed.target) as channel:

        @FEW
        @given(messages(method.input_type))
        def check(message: Any) -> None:
            call(channel, service, method, message.SerializeToString())

        @FEW
        @given(messages(method.input_type), st.integers(0, 10_000), st.integers(0, 255))
        def check_damaged(message: Any, at: int, by: int) -> None:
            call(channel, service, method, damaged(message.SerializeToString(), at, by))

        check()
        check_damaged()


@FEW
@given(messages(generation_service_pb2.Prompt.DESCRIPTOR), st.integers(0, 3))
def test_any_value_in_a_request_that_is_right_otherwise(fuzzed: RunningServer, wrong: Any, repeats: int) -> None:
    """A request that is wrong in one place only gets further than one that is wrong everywhere."""
    right = generation_service_pb2.Prompt(prompt="a", width=64, height=64, sample_steps=1)
    request = generation_service_pb2.GenerateRequest(model="chroma-mini", prompts=[right] * repeats)
    prompt = request.prompts.add()
    prompt.CopyFrom(right)
    prompt.MergeFrom(wrong)
    service, method = next(pair for pair in METHODS if pair[1].name == "Generate")
    with grpc.insecure_channel(fuzzed.target) as channel:
        call(channel, service, method, request.SerializeToString())


def memory_bytes() -> int:
    """Of this process, in which the server runs."""
    gc.collect()
    return used_memory_bytes(torch.device("cpu"))


def _kept_errors() -> int:
    """Errors of this process that are not freed; some are other tests'."""
    kinds = [type(kept) for kept in gc.get_objects()]
    return sum(issubclass(kind, errors.ChromaError | grpc.aio.AbortError) for kind in kinds)


def test_refused_requests_leave_nothing_behind(serve: Callable[..., RunningServer]) -> None:
    """Memory after many thousands of them, against what the first thousands took."""
    server = serve()
    wrong = generation_service_pb2.GenerateRequest(model="x" * 1000, prompts=[{"prompt": "y" * 10_000}])  # type: ignore[list-item]
    service, method = next(pair for pair in METHODS if pair[1].name == "Generate")

    with grpc.insecure_channel(server.target) as channel:
        data = wrong.SerializeToString()
        for _ in range(500):
            assert call(channel, service, method, data) is grpc.StatusCode.NOT_FOUND
        before = memory_bytes()
        for _ in range(1000):
            call(channel, service, method, data)
        # 1000 kept requests would be 11 MB.
        assert memory_bytes() - before < 5 * 2**20
        # Nor does anything wait for a garbage collection, which may be far off, with a request in its frames.
        gc.collect()
        gc.disable()
        try:
            kept = _kept_errors()
            for _ in range(100):
                call(channel, service, method, data)
            deadline = time.monotonic() + 30
            while _kept_errors() - kept > 20:  # a call's task may end a little after its answer
                assert time.monotonic() < deadline
                threading.Event().wait(0.1)
        finally:
            gc.enable()


def test_the_server_still_serves(fuzzed: RunningServer) -> None:
    with chromarpc.Client(fuzzed.target) as client:
        assert client.generate_images("a", model="chroma-mini", width=64, height=64, sample_steps=1)


@pytest.mark.parametrize(
    "token",
    [
        "[1" + "0" * 400 + ', "x"]',
        '[NaN, "x"]',
        '[null, "x"]',
        "[" * 5000,
        '{"a": 1}',
        "[0, []]",
        '"ab"',
        "\ud800",
        '[1, "\\ud800"]',
        '[true, "x\\u0000"]',
    ],
)
def test_page_tokens_that_look_right(fuzzed: RunningServer, token: str) -> None:
    encoded = base64.urlsafe_b64encode(token.encode("utf-8", "surrogatepass")).decode()
    with grpc.insecure_channel(fuzzed.target) as channel:
        for service, method in METHODS:
            if "page_token" in method.input_type.fields_by_name:
                message = GetMessageClass(method.input_type)(page_token=encoded)
                code = call(channel, service, method, message.SerializeToString())
                assert code is not grpc.StatusCode.INTERNAL
