"""Both clients against a real connection: events, errors, requests, tokens."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from chromarpc import (
    Accepted,
    AsyncClient,
    Client,
    Completed,
    DeadlineExceeded,
    HealthStatus,
    ImageReady,
    InvalidRequest,
    Lora,
    OutOfMemory,
    Prompt,
    ProtocolError,
    QueueFull,
    ServerUnavailable,
    Step,
    TlsOptions,
    WeightsMissing,
    parse_request_json,
)
from chromarpc.channel import is_loopback
from chromarpc.request import build_request
from tests.client.client_fake_server import (
    PATIENCE_S,
    FakeServer,
    JobEvent,
    Request,
    Story,
    abort,
    detailed_status,
    png,
    refusing,
)

QUEUE_FULL = detailed_status(
    grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", reason="QUEUE_FULL", retry_after_s=7
)

SECRET = "s3cret"


# What both clients have in common


def test_generate_yields_events_and_images(client: Client) -> None:
    seen = []
    images = client.generate_images(["a", "b"], on_event=seen.append)
    assert isinstance(seen[0], Accepted)
    assert isinstance(seen[-1], Completed)
    assert [image.data for image in images] == [png(0), png(1)]
    assert images[1].image.size == (32, 32)
    assert images[1].image.getpixel((0, 0)) == (1, 120, 30)
    assert images[1].image is images[1].image


async def test_generate_yields_events_and_images_async(async_client: AsyncClient) -> None:
    seen = []
    images = await async_client.generate_images(["a", "b"], on_event=seen.append)
    assert isinstance(seen[0], Accepted)
    assert isinstance(seen[-1], Completed)
    assert [image.data for image in images] == [png(0), png(1)]


def test_matching_on_events(client: Client) -> None:
    steps, pictures = [], 0
    for event in client.generate("a"):
        match event:
            case Step(step=step, total_steps=total):
                steps.append(f"{step}/{total}")
            case ImageReady(image=image):
                pictures += image.width
    assert steps == ["1/2", "2/2"]
    assert pictures == 32


def test_an_exhausted_stream_stays_exhausted(client: Client) -> None:
    stream = client.generate("a")
    assert len(list(stream)) > 5
    assert list(stream) == []


def test_a_status_becomes_its_error(server: FakeServer, client: Client) -> None:
    server.script = refusing(QUEUE_FULL)
    with pytest.raises(QueueFull, match="the queue is full") as caught:
        list(client.generate("a"))
    assert caught.value.retry_after_s == 7
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.__suppress_context__


async def test_a_status_becomes_its_error_async(server: FakeServer, async_client: AsyncClient) -> None:
    server.script = refusing(QUEUE_FULL)
    with pytest.raises(QueueFull, match="the queue is full") as caught:
        await async_client.generate_images("a")
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_no_wire_error_gets_through(
    server: FakeServer, client: Client, async_client: AsyncClient, code: grpc.StatusCode
) -> None:
    from chromarpc.errors import CODE_ERRORS

    server.script = refusing(detailed_status(code, "because"))
    with pytest.raises(CODE_ERRORS[code], match="because"):
        client.generate_images("a")
    with pytest.raises(CODE_ERRORS[code], match="because"):
        await async_client.generate_images("a")


async def test_the_failed_event_survives_a_gateway_that_drops_details(
    server: FakeServer, client: Client, async_client: AsyncClient
) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        from chromarpc.v1 import job_event_pb2

        story = Story()
        yield story.accepted(request)
        yield story(failed=job_event_pb2.Failed(code=8, reason="OUT_OF_MEMORY", message="too large"))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "something")

    server.script = script
    with pytest.raises(OutOfMemory, match="too large"):
        client.generate_images("a")
    with pytest.raises(OutOfMemory, match="too large"):
        await async_client.generate_images("a")


async def test_a_broken_stream_is_refused_and_cancelled(
    server: FakeServer, client: Client, async_client: AsyncClient
) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        yield Story().queued(1)
        yield from server.wait_for_end()

    server.script = script
    with pytest.raises(ProtocolError):
        client.generate_images("a")
    assert server.ended.wait(PATIENCE_S)
    server.ended.clear()
    with pytest.raises(ProtocolError):
        await async_client.generate_images("a")
    assert await asyncio.to_thread(server.ended.wait, PATIENCE_S)


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
            client.list_models()
        with pytest.raises(ServerUnavailable):
            client.generate_images("a")


async def test_nobody_listens_async() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
            await client.server_info()
        with pytest.raises(ServerUnavailable):
            await client.generate_images("a")


# Requests


def test_arguments_become_the_request(server: FakeServer, client: Client) -> None:
    client.generate_images(
        ["[trigger] a", Prompt("b", width=64, seed=0, trigger_word="")],
        model="chroma-mini",
        loras=[Lora("j/l.safetensors", 0.8), "k.safetensors", Path("a") / "b.safetensors"],
        trigger_word="sks",
        width=256,
        seed=7,
        guidance_scale=3.7,
        noise_draw="legacy",
        output_format="webp",
        output_quality=80,
        preview_every=5,
    )
    wanted = {
        "model": "chroma-mini",
        "loras": [
            {"path": "j/l.safetensors", "network_multiplier": 0.8},
            {"path": "k.safetensors"},
            {"path": "a/b.safetensors"},
        ],
        "trigger_word": "sks",
        "prompts": [
            {"prompt": "[trigger] a", "width": 256, "seed": 7, "guidance_scale": 3.7},
            {"prompt": "b", "width": 64, "seed": 0, "guidance_scale": 3.7, "trigger_word": ""},
        ],
        "output": {"format": "IMAGE_FORMAT_WEBP", "quality": 80},
        "preview": {"every_n_steps": 5},
        "noise_draw": "NOISE_DRAW_LEGACY",
    }
    assert server.requests == [parse_request_json(json.dumps(wanted)).request]


def test_what_is_left_out_stays_out() -> None:
    assert build_request("a") == parse_request_json('{"model": "chroma", "prompts": [{"prompt": "a"}]}').request
    assert not build_request("a").HasField("output")
    assert not build_request([]).prompts


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"width": 2**40}, "prompts.0.width"),
        ({"width": 64.5}, "prompts.0.width"),
        ({"seed": 2**63}, "prompts.0.seed"),
        ({"guidance_scale": "4"}, "prompts.0.guidance_scale"),
        ({"neg": "\ud800"}, "prompts.0.neg"),
        ({"loras": Lora("x", "1")}, "loras.0.network_multiplier"),  # type: ignore[arg-type]
        ({"output_format": "gif"}, "output.format"),
        ({"output_quality": 2**31}, "output.quality"),
        ({"noise_draw": "old"}, "noise_draw"),
        ({"preview_every": 2**31}, "preview.every_n_steps"),
        ({"model": 7}, "model"),
    ],
)
def test_what_no_request_can_hold_names_its_field(client: Client, options: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a", **options)
    assert [violation.field for violation in caught.value.violations] == [path]


def test_an_argument_that_does_not_exist_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="stepps"):
        client.generate("a", stepps=3)  # type: ignore[call-arg]


# Everything else a server can be asked


async def test_models_info_and_health(server: FakeServer, client: Client, async_client: AsyncClient) -> None:
    assert [model.id for model in client.list_models()] == ["chroma", "chroma-mini"]
    assert client.list_models() == await async_client.list_models()
    assert client.server_info().version == "1.2.3"
    assert client.server_info() == await async_client.server_info()
    for status in (HealthStatus.SERVING, HealthStatus.NOT_SERVING):
        server.health = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
        assert client.health() is await async_client.health() is status
    assert client.health("nothing") is await async_client.health("nothing") is HealthStatus.SERVICE_UNKNOWN


async def test_waiting_until_a_server_serves(
    server: FakeServer, client: Client, async_client: AsyncClient
) -> None:
    client.wait_until_serving(timeout_s=PATIENCE_S)
    await async_client.wait_until_serving(timeout_s=PATIENCE_S)
    with Client("127.0.0.1:1") as nobody, pytest.raises(DeadlineExceeded):
        nobody.wait_until_serving(timeout_s=0.2)
    async with AsyncClient("127.0.0.1:1") as nobody_async:
        with pytest.raises(DeadlineExceeded):
            await nobody_async.wait_until_serving(timeout_s=0.2)


# Tokens and TLS


async def test_the_token_travels_with_every_call_and_shows_nowhere(server: FakeServer) -> None:
    with Client(server.target, token=SECRET) as client:
        client.list_models()
        client.generate_images("a")
        assert SECRET not in repr(client) + repr(client._connection)
    async with AsyncClient(server.target, token=SECRET) as async_client:
        await async_client.list_models()
        assert SECRET not in repr(async_client)
    assert [metadata["authorization"] for metadata in server.metadata] == [f"Bearer {SECRET}"] * 3


def test_a_token_does_not_leave_the_machine_in_plain_text() -> None:
    with pytest.raises(ValueError, match="plain text") as caught:
        Client("gpu.example:50051", token=SECRET)
    assert SECRET not in str(caught.value)
    Client("gpu.example:50051", token=SECRET, allow_insecure_token=True).close()
    Client("gpu.example:50051", token=SECRET, tls=True).close()
    for token in ("", "a\nb", "ü"):
        with pytest.raises(ValueError, match="token"):
            Client(token=token)


@pytest.mark.parametrize(
    "target",
    ["localhost", "localhost:1", "127.0.0.1:1", "127.8.9.1", "[::1]:50051", "::1", "unix:/run/c.sock",
     "unix:///run/c.sock", "dns:///localhost:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"],
)  # fmt: skip
def test_targets_on_this_machine(target: str) -> None:
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    ["gpu:1", "localhost.example:1", "10.0.0.1:1", "[::2]:1", "0.0.0.0:1", "dns://8.8.8.8/localhost:1",
     "dns:///gpu:1", "xds:///localhost", "ipv4:127.0.0.1:1,10.0.0.1:1", ""],
)  # fmt: skip
def test_targets_elsewhere(target: str) -> None:
    assert not is_loopback(target)


def test_tls_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together"):
        Client(tls=TlsOptions(certificate=tmp_path / "c.pem"))
    with pytest.raises(FileNotFoundError):
        Client(tls=TlsOptions(root_certificates=tmp_path / "none.pem"))


# The package


def test_importing_the_client_is_light() -> None:
    code = (
        "import sys, chromarpc; heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'safetensors', "
        "'chromarpc_server', 'pydantic', 'PIL', 'rich', 'typer'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_every_public_name_exists() -> None:
    import chromarpc

    assert len(set(chromarpc.__all__)) == len(chromarpc.__all__)
    assert all(hasattr(chromarpc, name) for name in chromarpc.__all__)
    assert chromarpc.__version__[0].isdigit()


def test_a_refusal_mid_stream_keeps_its_fetch_command(server: FakeServer, client: Client) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        yield Story().accepted(request)
        status = detailed_status(
            grpc.StatusCode.FAILED_PRECONDITION,
            "run `chromarpc-server fetch chroma`",
            reason="WEIGHTS_MISSING",
        )
        abort(context, status)

    server.script = script
    with pytest.raises(WeightsMissing, match="fetch chroma"):
        client.generate_images("a")
