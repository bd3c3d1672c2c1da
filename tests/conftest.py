"""What every test may use: a tiny checkpoint, and real servers over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from chromarpc_server.app import App
from chromarpc_server.settings import ServerSettings
from tests.tiny_checkpoint import GOLDENS, write_tiny_checkpoint

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@dataclass
class RunningServer:
    """A server in a thread of its own."""

    app: App
    port: int
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    exit_code: list[int]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> int:
        """Begins an orderly stop, where it has not ended already, and waits for its end."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.app.stop)
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()
        return self.exit_code[0]


def start_server(**settings: Any) -> RunningServer:
    """Starts a server and waits until it is SERVING; on one CPU where nothing else is said."""
    if "devices" not in settings:
        settings["device"] = "cpu"
    ready = threading.Event()
    holder: dict[str, Any] = {}

    async def serve() -> None:
        app = App(ServerSettings(port=0, **settings))
        started = asyncio.get_running_loop().create_future()
        holder.update(app=app, loop=asyncio.get_running_loop())
        serving = asyncio.create_task(app.run(started))
        await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            holder["port"] = started.result()
        ready.set()
        holder["exit_code"].append(await serving)

    holder["exit_code"] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server")
    thread.start()
    assert ready.wait(60)
    return RunningServer(holder["app"], holder["port"], holder["loop"], thread, holder["exit_code"])


@pytest.fixture
def serve(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers over the tiny checkpoint; stops what the test leaves running."""
    servers: list[RunningServer] = []

    def start(**settings: Any) -> RunningServer:
        settings.setdefault("model_folder", {"chroma-mini": tiny_checkpoint})
        settings.setdefault("grace_s", 0)
        # A server that was stopped hands its jobs to the next one; servers side by side have nothing in common.
        beside = sum(server.thread.is_alive() for server in servers)
        settings.setdefault("data_dir", tmp_path / (f"data{beside}" if beside else "data"))
        servers.append(start_server(**settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.thread.is_alive():
            server.stop()


@pytest.fixture(scope="session")
def lora_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="session")
def server(
    tiny_checkpoint: Path, lora_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for tests that leave it as it was."""
    running = start_server(
        model_folder={"chroma-mini": tiny_checkpoint},
        lora_root=lora_root,
        data_dir=tmp_path_factory.mktemp("data"),
        grace_s=0,
        preload=["chroma-mini"],
    )
    yield running
    running.stop()
