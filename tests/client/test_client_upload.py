"""The steps of an upload, with the server's answers made up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import grpc
import pytest

from chromarpc import AsyncClient, Client
from chromarpc.cli.request import parse_lora
from chromarpc.errors import (
    DeadlineExceeded,
    Draining,
    ProtocolError,
    QuotaExceeded,
    StatusError,
    UploadOutOfOrder,
)
from chromarpc.request import Lora
from chromarpc.upload import RETRY_DELAYS_S, Call, Steps, Uploaded, Wait, advance, upload_steps
from chromarpc.v1 import lora_service_pb2
from tests.client.replay_fake_server import DrawingServer

CONTENT = bytes(range(250)) * 4
CREATED = lora_service_pb2.CreateLoraUploadResponse(upload_id="secret", max_chunk_bytes=400)


def failure(kind: type[StatusError], **more: Any) -> StatusError:
    return kind("no", code=grpc.StatusCode.UNAVAILABLE, **more)


def received(offset: int) -> lora_service_pb2.AppendLoraUploadResponse:
    return lora_service_pb2.AppendLoraUploadResponse(next_offset=offset)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BufferedReader]:
    (tmp_path / "a").write_bytes(CONTENT)
    with (tmp_path / "a").open("rb") as file:
        yield file


def begun(file: BufferedReader) -> Steps:
    """An upload whose first call was made."""
    steps = upload_steps(file, "a", None)
    advance(steps, None)
    return steps


def test_chunks_follow_each_other_and_the_hash_ends_them(file: BufferedReader) -> None:
    told: list[tuple[int, int]] = []
    steps = upload_steps(file, "a", lambda *step: told.append(step))
    first = advance(steps, None)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert isinstance(first, Call)
    assert first.request == lora_service_pb2.CreateLoraUploadRequest(filename="a", size_bytes=1000, sha256=sha256)
    answer: Any = CREATED
    chunks = []
    for offset in (400, 800, 1000):
        step = advance(steps, answer)
        assert isinstance(step, Call)
        chunks.append(step.request.chunk)  # type: ignore[attr-defined]
        answer = received(offset)
    assert b"".join(chunks) == CONTENT
    final = advance(steps, answer)
    assert isinstance(final, Call)
    assert final.request == lora_service_pb2.FinalizeLoraUploadRequest(upload_id="secret", sha256=sha256)
    answer = lora_service_pb2.FinalizeLoraUploadResponse(lora=lora_service_pb2.StoredLora(path="sha256:x"))
    done = advance(steps, answer)
    assert isinstance(done, Uploaded)
    assert done.lora.path == "sha256:x"
    assert told == [(0, 1000), (400, 1000), (800, 1000), (1000, 1000)]


def test_a_first_call_that_fails_is_not_repeated(file: BufferedReader) -> None:
    with pytest.raises(Draining):
        advance(begun(file), failure(Draining))


def test_waits_grow_and_end_and_a_step_forward_starts_over(file: BufferedReader) -> None:
    steps = begun(file)
    call = advance(steps, CREATED)
    for delay_s in RETRY_DELAYS_S:
        assert advance(steps, failure(Draining)) == Wait(delay_s)
        assert advance(steps, None) == call
    advance(steps, received(400))
    for delay_s in RETRY_DELAYS_S:
        assert advance(steps, failure(DeadlineExceeded)) == Wait(delay_s)
        advance(steps, None)
    with pytest.raises(DeadlineExceeded):
        advance(steps, failure(DeadlineExceeded))


def test_the_servers_advice_is_taken(file: BufferedReader) -> None:
    steps = begun(file)
    advance(steps, CREATED)
    assert advance(steps, failure(Draining, retry_after_s=30.0)) == Wait(30.0)


def test_calls_that_come_too_fast_are_waited_for_and_other_quotas_are_not(file: BufferedReader) -> None:
    steps = begun(file)
    call = advance(steps, CREATED)
    too_fast = failure(QuotaExceeded, metadata={"quota": "max_calls_per_minute"}, retry_after_s=3.0)
    assert advance(steps, too_fast) == Wait(3.0)
    assert advance(steps, None) == call
    with pytest.raises(QuotaExceeded):
        advance(steps, failure(QuotaExceeded, metadata={"quota": "max_upload_bytes"}))


@pytest.mark.parametrize("given", [{"upload_id": "x"}, {"max_chunk_bytes": 10}, {}])
def test_a_beginning_without_a_way_on_is_an_error(file: BufferedReader, given: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        advance(begun(file), lora_service_pb2.CreateLoraUploadResponse(**given))


@pytest.mark.parametrize("offset", [0, 1001, 2**64 - 1])
def test_an_offset_that_cannot_be_is_an_error(file: BufferedReader, offset: int) -> None:
    steps = begun(file)
    advance(steps, CREATED)
    with pytest.raises(ProtocolError, match=f"wants byte {offset}"):
        advance(steps, received(offset))


@pytest.mark.parametrize("expected", ["", "-1", "1001", "x"])
def test_advice_that_cannot_be_followed_is_the_error_itself(file: BufferedReader, expected: str) -> None:
    steps = begun(file)
    advance(steps, CREATED)
    with pytest.raises(UploadOutOfOrder):
        advance(steps, failure(UploadOutOfOrder, metadata={"expected_offset": expected}))


def test_a_server_that_never_agrees_ends_the_upload(file: BufferedReader) -> None:
    steps = begun(file)
    advance(steps, CREATED)
    for _ in RETRY_DELAYS_S:
        advance(steps, failure(UploadOutOfOrder, metadata={"expected_offset": "0"}))
    with pytest.raises(UploadOutOfOrder):
        advance(steps, failure(UploadOutOfOrder, metadata={"expected_offset": "0"}))


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT * 1000)
    with (tmp_path / "a").open("rb") as file:
        steps = begun(file)
        (tmp_path / "a").write_bytes(b"")
        with pytest.raises(OSError, match="became shorter"):
            advance(steps, CREATED)


def test_a_hash_is_never_taken_for_a_multiplier() -> None:
    path = f"sha256:{'1' * 64}"
    assert parse_lora(path) == Lora(path)
    assert parse_lora(f"{path}:0.5") == Lora(path, 0.5)


async def test_a_file_that_is_open_is_uploaded_and_stays_open(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(CONTENT)
    fake = DrawingServer()
    running = fake.start()
    try:
        with (tmp_path / "a.safetensors").open("rb") as file, Client(fake.target) as client:
            assert client.upload_lora(file).path == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
            fake.uploads.clear()
            file.seek(7)
            async with AsyncClient(fake.target) as async_client:
                await async_client.upload_lora(file, filename="b")
            assert not file.closed
    finally:
        running.stop(grace=None).wait()
    assert fake.upload_calls == ["a.safetensors", "b"]
    assert list(fake.uploads.values()) == [CONTENT]
