"""A server with an adapter root of its own, and who calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from chromarpc import Client
from chromarpc import upload as client_upload
from chromarpc.v1 import lora_service_pb2_grpc
from tests.conftest import RunningServer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def library_server(serve: Callable[..., RunningServer], root: Path) -> RunningServer:
    """A server with an empty adapter root and no uploads, whose `chroma` is the tiny model."""
    return serve(lora_root=root, alias={"chroma": "chroma-mini"})


@pytest.fixture
def client(library_server: RunningServer) -> Iterator[Client]:
    with Client(library_server.target, timeout_s=60) as client:
        yield client


@pytest.fixture
def stub(library_server: RunningServer) -> Iterator[lora_service_pb2_grpc.LoraServiceStub]:
    with grpc.insecure_channel(library_server.target) as channel:
        yield lora_service_pb2_grpc.LoraServiceStub(channel)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_upload, "RETRY_DELAYS_S", (0.0, 0.0))
