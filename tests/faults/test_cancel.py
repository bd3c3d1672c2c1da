"""A cancel that was acknowledged holds, whatever becomes of the server."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2
from chromarpc_server.jobs import encoding
from tests.conftest import RunningServer
from tests.faults.processes import ServerProcess, server_process
from tests.faults.server import HANGS

Serve = Callable[..., RunningServer]
State = job_service_pb2.JobState
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 1024, "height": 1024, "sample_steps": 8}
"""A step of it takes longer than a call."""
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}


def _until_step(events: Any) -> None:
    for event in events:
        if isinstance(event, chromarpc.Step):
            return
    raise AssertionError("the stream ended before a step")


def _end(client: chromarpc.Client, job_id: str) -> str:
    """How a job ends."""
    try:
        return type(list(client.watch_job(job_id))[-1]).__name__
    except chromarpc.StatusError as error:
        return error.reason


def test_a_cancel_of_a_running_job_outlives_kill_nine(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "hang")  # a step that takes longer than the server lives
    with (
        server_process(tiny_checkpoint, tmp_path, module="tests.faults.server") as server,
        chromarpc.Client(server.target) as client,
    ):
        running = client.create_job("a", **SMALL)
        while HANGS not in server.log:
            time.sleep(0)
        assert client.cancel_job(running.job_id).state == State.JOB_STATE_RUNNING
        server.kill()
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        assert _end(client, running.job_id) == "CANCELLED"
        assert client.get_job(running.job_id).state == State.JOB_STATE_CANCELLED
        assert client.get_job(running.job_id).done_steps == 0  # not run again
        assert client.generate_images("the next one runs", **SMALL)


def test_a_cancel_during_a_drain_outlives_the_server(serve: Serve) -> None:
    """Of a job that waited and was set aside, and of one that runs and is about to be."""
    server = serve(grace_s=60)
    with chromarpc.Client(server.target) as client:
        running = client.create_job("a", **LONG)
        waiting = client.create_job("b", **SMALL)
        _until_step(client.watch_job(running.job_id))
        assert server.app._engine is not None
        set_aside = server.app._engine.jobs._jobs[waiting.job_id].log
        server.loop.call_soon_threadsafe(server.app.stop)
        while not set_aside.suspended:
            time.sleep(0)
        client.cancel_job(waiting.job_id)
        # The second signal: the running job is to be left to the next process, and is cancelled before it is.
        server.loop.call_soon_threadsafe(server.app.signalled)
        client.cancel_job(running.job_id)
        assert server.stop() == 0
    server = serve()
    with chromarpc.Client(server.target) as client:
        assert {job_id: _end(client, job_id) for job_id in (waiting.job_id, running.job_id)} == {
            waiting.job_id: "CANCELLED",
            running.job_id: "CANCELLED",
        }


def _limit_files(server: ServerProcess, size: int) -> None:
    hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process's files")
def test_a_cancel_that_cannot_be_stored_is_not_acknowledged_and_stops_the_job(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        running = client.create_job("a", **LONG)
        watcher = client.watch_job(running.job_id)
        _until_step(watcher)
        _limit_files(server, 1)  # no write beyond the first byte of any file succeeds
        answers = []
        for _ in range(2):  # while it runs, and once it is stopped
            with pytest.raises(chromarpc.StatusError) as refused:
                client.cancel_job(running.job_id)
            answers.append(refused.value.reason)
            # Its end is told once it is stored, and not before.
            assert client.get_job(running.job_id).state == State.JOB_STATE_RUNNING
        assert answers == ["STORE_UNAVAILABLE"] * 2
        _limit_files(server, resource.RLIM_INFINITY)
        with pytest.raises(chromarpc.Cancelled):
            list(watcher)
        assert client.get_job(running.job_id).state == State.JOB_STATE_CANCELLED


def test_a_cancel_that_is_acknowledged_while_the_last_image_is_encoded_is_the_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is done with the job by then, and looks no more whether it is to stop."""
    may_go_on = threading.Event()
    encode = encoding.encode_image

    def encode_late(*arguments: Any) -> Any:
        assert may_go_on.wait(30)
        return encode(*arguments)

    monkeypatch.setattr(encoding, "encode_image", encode_late)
    server = serve()
    with chromarpc.Client(server.target) as client:
        job_id = client.create_job("a", **SMALL).job_id
        _until_step(client.watch_job(job_id))
        while client.server_info().queue.running_jobs:
            pass
        assert client.cancel_job(job_id).state == State.JOB_STATE_RUNNING
        may_go_on.set()
        assert _end(client, job_id) == "CANCELLED"
        assert client.get_job(job_id).state == State.JOB_STATE_CANCELLED
