"""Cancelling, deadlines, full queues, stopping: each frees the device within one step, and only that job."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from tests.conftest import RunningServer
from tests.faults.processes import server_process

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
Serve = Callable[..., RunningServer]


def _until_step(events: Any) -> None:
    for event in events:
        if isinstance(event, chromarpc.Step):
            return
    raise AssertionError("the stream ended before the first step")


def _wait_for(caplog: pytest.LogCaptureFixture, event: str, count: int = 1) -> list[logging.LogRecord]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [record for record in caplog.records if record.getMessage() == event]
        if len(found) >= count:
            return found
        threading.Event().wait(0.02)
    raise AssertionError(f"no {count} × {event} in {[record.getMessage() for record in caplog.records]}")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    return caplog


def test_leaving_the_stream_stops_the_job_within_one_step(server: RunningServer, log: Any) -> None:
    with chromarpc.Client(server.target) as client:
        with client.generate("a", **LONG) as events:
            _until_step(events)
        (record,) = _wait_for(log, "job.cancelled")
        assert record.ran_s < 30
        assert client.generate_images("still serving", **SMALL)


def test_a_client_that_is_killed_frees_the_device(server: RunningServer, log: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from chromarpc.cli import main; main()", "generate", "a", "--events"]
    command += ["--model", "chroma-mini", "--target", server.target, "-o", str(tmp_path / "out.png")]
    command += ["--width", "256", "--height", "256", "--sample-steps", "150"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        else:
            raise AssertionError("the stream ended before the first step")
        process.send_signal(signal.SIGKILL)
    assert _wait_for(log, "job.cancelled")
    with chromarpc.Client(server.target) as client:
        assert client.generate_images("still serving", **SMALL)


def test_a_deadline_that_passes_mid_step_is_told_as_such(server: RunningServer, log: Any) -> None:
    with chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.DeadlineExceeded):
            list(client.generate("a", timeout_s=0.5, **LONG))
        assert _wait_for(log, "job.cancelled")
        assert client.generate_images("still serving", **SMALL)


def test_a_full_queue_refuses_and_says_when_to_try_again(serve: Serve, log: Any) -> None:
    server = serve(limits={"max_queued_jobs": 1})
    with chromarpc.Client(server.target) as client:
        running = client.generate("a", **LONG)
        _until_step(running)
        waiting = client.generate("b", **SMALL)
        kinds = [type(next(waiting)).__name__ for _ in range(2)]
        assert kinds == ["Accepted", "Queued"]
        with pytest.raises(chromarpc.QueueFull) as caught:
            list(client.generate("c", **SMALL))
        assert caught.value.retry_after_s is not None
        running.cancel()
        assert type(list(waiting)[-1]).__name__ == "Completed"


def test_cancelling_a_waiting_job_leaves_the_running_one_alone(serve: Serve, log: Any) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        running = client.generate("a", **{**LONG, "sample_steps": 40})
        _until_step(running)
        waiting = client.generate("b", **SMALL)
        next(waiting)
        waiting.cancel()
        assert _wait_for(log, "job.cancelled")
        assert type(list(running)[-1]).__name__ == "Completed"


async def _first_position(stream: Any) -> int:
    async for event in stream:
        if isinstance(event, chromarpc.Queued):
            position: int = event.position
            return position
    raise AssertionError("the stream ended before the job was queued")


def test_the_queue_is_served_in_order_and_tells_positions(serve: Serve) -> None:
    server = serve()

    async def go() -> list[list[int]]:
        async with chromarpc.AsyncClient(server.target) as client:
            first = client.generate("a", **LONG)
            await anext(aiter(first))
            others, found = [], []
            for number in range(2):
                others.append(client.generate(f"{number}", **SMALL))
                found.append([await _first_position(others[-1])])
            first.cancel()

            async def follow(stream: Any, positions: list[int]) -> None:
                positions += [event.position async for event in stream if isinstance(event, chromarpc.Queued)]

            await asyncio.gather(*(follow(*pair) for pair in zip(others, found, strict=True)))
            return found

    one, two = asyncio.run(go())
    assert one == [1]
    assert two == [2, 1]


def test_stopping_lets_the_running_job_finish_and_refuses_new_ones(serve: Serve) -> None:
    server = serve(grace_s=60)
    with chromarpc.Client(server.target) as client:
        running = client.generate("a", **{**LONG, "sample_steps": 60})
        _until_step(running)
        server.loop.call_soon_threadsafe(server.app.stop)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                list(client.generate("b", **SMALL))
            except chromarpc.Draining as error:
                assert error.retry_after_s is not None
                break
        else:
            raise AssertionError("new jobs were still taken")
        assert type(list(running)[-1]).__name__ == "Completed"
    assert server.stop() == 0


def test_a_grace_time_that_is_over_ends_the_job_as_draining(serve: Serve) -> None:
    server = serve(grace_s=0)
    with chromarpc.Client(server.target) as client:
        running = client.generate("a", **LONG)
        _until_step(running)
        server.loop.call_soon_threadsafe(server.app.stop)
        with pytest.raises(chromarpc.Draining):
            list(running)
    assert server.stop() == 0


def test_sigterm_ends_the_process_with_0(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", "--device", "cpu"]
    command += ["--model-folder", f"chroma-mini={tiny_checkpoint}", "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "listens on 127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_sigterm_once_more_does_not_change_how_the_process_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server:
        server.process.send_signal(signal.SIGTERM)
        while server.process.poll() is None:  # until the last moment, in which Python itself ends
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.01)  # without a pause it would do nothing but take signals
        assert server.wait() == 0


def test_health_and_models_answer_while_a_generation_runs(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client, client.generate("a", **LONG) as events:
        _until_step(events)
        assert client.health()
        assert client.list_models()
        assert client.server_info().queue.running_jobs == 1
