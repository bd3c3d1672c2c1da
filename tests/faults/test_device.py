"""The device fails in every way it can: what the client sees, and what remains."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2
from tests.faults.processes import ServerProcess, server_process

State = job_service_pb2.JobState
Start = Callable[..., Any]
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 4}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}


@pytest.fixture
def faulty(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(fault: str, *flags: str) -> Any:
        monkeypatch.setenv("FAULT", fault)
        return server_process(tiny_checkpoint, tmp_path, *flags, module="tests.faults.server")

    return start


def _end(client: chromarpc.Client, job_id: str) -> chromarpc.StatusError:
    with pytest.raises(chromarpc.StatusError) as error:
        list(client.watch_job(job_id))
    return error.value


@pytest.mark.parametrize(
    ("fault", "reason", "flags"),
    [
        ("device_lost", "DEVICE_LOST", ()),
        ("hang", "DEVICE_HUNG", ("--step-timeout-s", "1")),
        ("thread_ends", "DEVICE_LOST", ()),
    ],
)
def test_a_device_that_is_gone_ends_the_process_and_keeps_its_jobs(
    faulty: Start, tiny_checkpoint: Path, tmp_path: Path, fault: str, reason: str, flags: tuple[str, ...]
) -> None:
    with faulty(fault, *flags) as server, chromarpc.Client(server.target) as client:
        with client.generate("a", detach=True, **SMALL) as running:
            job_id = next(running).job_id
            waiting = client.create_job("b", **SMALL).job_id
            with pytest.raises(chromarpc.StatusError) as told:
                list(running)
        assert told.value.reason == reason
        assert told.value.code.name == "INTERNAL"
        assert server.wait() == 70
        assert ("device.hung" in server.log) == (fault == "hang")
        if fault == "hang":
            assert "in _hang" in server.log  # the stack of the thread that hangs
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        for one in (job_id, waiting):
            assert isinstance(list(client.watch_job(one))[-1], chromarpc.Completed)
        assert client.get_job(job_id).attempt_count == 2
        assert client.get_job(waiting).attempt_count == 1


def test_without_a_store_a_lost_device_fails_its_jobs(faulty: Start) -> None:
    with faulty("device_lost", "--store", "memory") as server, chromarpc.Client(server.target) as client:
        running = client.generate("a", **SMALL)
        next(running)
        waiting = client.generate("b", **SMALL)
        next(waiting)
        with pytest.raises(chromarpc.DeviceLost):
            list(running)
        with pytest.raises(chromarpc.Draining):
            list(waiting)
        assert server.wait() == 70


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("out_of_memory", "OUT_OF_MEMORY"),
        ("out_of_memory_in_words", "OUT_OF_MEMORY"),
        ("full_device", "OUT_OF_MEMORY"),
        ("exception", "INTERNAL"),
        ("frightening_text", "INTERNAL"),
    ],
)
def test_what_ends_one_job_ends_no_other(faulty: Start, fault: str, reason: str) -> None:
    with faulty(fault, "--log-format", "json") as server, chromarpc.Client(server.target) as client:
        failing = client.create_job("a", **SMALL).job_id
        after = client.create_job("b", **SMALL).job_id
        error = _end(client, failing)
        assert error.reason == reason
        assert isinstance(list(client.watch_job(after))[-1], chromarpc.Completed)
        assert client.health()
        assert client.get_job(failing).state == State.JOB_STATE_FAILED
        assert "secret" not in f"{error} {error.metadata}"
        assert server.stop() == 0
        if reason == "INTERNAL":
            lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
            assert error.metadata["error_id"] in [line.get("error_id") for line in lines]


def _probe(port: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def _until_step(events: Any) -> None:
    for event in events:
        if isinstance(event, chromarpc.Step):
            return
    raise AssertionError("the stream ended before the first step")


def _metrics_port(server: ServerProcess) -> str:
    while "metrics.listening" not in server.log:
        assert server.process.poll() is None
    line = next(line for line in server.log.splitlines() if "metrics.listening" in line)
    return line.rpartition("port=")[2].strip()


def test_sigterm_drains_and_a_second_one_ends_the_grace(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--grace-s", "600", "--metrics-port", "0")
    with server_process(tiny_checkpoint, tmp_path, *flags) as server, chromarpc.Client(server.target) as client:
        port = _metrics_port(server)
        assert (_probe(port, "/livez"), _probe(port, "/readyz")) == (200, 200)
        running = client.generate("a", **LONG)
        _until_step(running)
        server.process.send_signal(signal.SIGTERM)
        while _probe(port, "/readyz") == 200:
            pass
        assert _probe(port, "/livez") == 200
        with pytest.raises(chromarpc.Draining):
            client.create_job("b", **SMALL)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(chromarpc.Draining) as told:
            list(running)
        assert told.value.retry_after_s is not None
        assert server.wait() == 0
