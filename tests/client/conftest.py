from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from chromarpc import AsyncClient, Client
from tests.client.client_fake_server import FakeServer
from tests.client.replay_command import Replay
from tests.client.replay_fake_server import DrawingServer, Run
from tests.client.shell import Shell


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    running = fake.start()
    yield fake
    running.stop(grace=None).wait()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout_s=20) as client:
        yield client


@pytest_asyncio.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout_s=20) as client:
        yield client


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(server)


@pytest.fixture
def drawing() -> Iterator[DrawingServer]:
    fake = DrawingServer()
    running = fake.start()
    yield fake
    running.stop(grace=None).wait()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def replay(drawing: DrawingServer, run: Run, tmp_path: Path) -> Replay:
    return Replay(drawing, run.path, tmp_path / "report")
