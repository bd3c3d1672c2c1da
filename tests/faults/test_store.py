"""A store that cannot be used, a disk that is full, and a start that fails."""

from __future__ import annotations

import hashlib
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2
from tests.faults.processes import ServerProcess, server_process, until_step

State = job_service_pb2.JobState
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 100}


def _refusal(checkpoint: Path, data_dir: Path, *flags: str) -> str:
    command = [
        sys.executable,
        "-m",
        "chromarpc_server",
        "--port",
        "0",
        "--device",
        "cpu",
        "--data-dir",
        str(data_dir),
    ]
    command += ["--model-folder", f"chroma-mini={checkpoint}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_a_store_that_cannot_be_used_is_named_and_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        job = client.create_job("a", **SMALL)
        list(client.watch_job(job.job_id))
        assert "in use by another process" in _refusal(tiny_checkpoint, tmp_path)
        assert client.get_job(job.job_id).state == State.JOB_STATE_SUCCEEDED
        server.stop()
    path = tmp_path / "jobs" / "jobs.sqlite3"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in _refusal(tiny_checkpoint, tmp_path)
    assert path.read_bytes() == whole[: len(whole) // 2]
    path.write_bytes(whole)
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        image = client.get_job(job.job_id).images[0]
        assert hashlib.sha256(client.get_image_bytes(job.job_id)).hexdigest() == image.sha256


def test_a_start_that_fails_costs_no_job_an_attempt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    at_once = ("--grace-s", "0")
    with (
        server_process(tiny_checkpoint, tmp_path, *at_once) as server,
        chromarpc.Client(server.target) as client,
    ):
        running = client.create_job("a", **LONG)
        until_step(client.watch_job(running.job_id))
        assert server.stop() == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ("--metrics-port", str(taken.getsockname()[1]))
        for _ in range(2):
            assert "--metrics-port" in _refusal(tiny_checkpoint, tmp_path, *flags)
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        until_step(client.watch_job(running.job_id))
        assert client.get_job(running.job_id).attempt_count <= 1
        client.cancel_job(running.job_id)


def test_a_folder_that_is_none_is_named_with_its_setting(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = _refusal(tiny_checkpoint, tmp_path / "file")
    assert f"{tmp_path / 'file'} cannot be used" in told
    assert "--data-dir" in told


def _limit_files(server: ServerProcess, size: int) -> None:
    hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process's files")
def test_a_full_disk_refuses_jobs_holds_the_end_of_the_running_one_and_passes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        running = client.create_job("a", **{**LONG, "sample_steps": 40})
        watcher = client.watch_job(running.job_id)
        until_step(watcher)
        _limit_files(server, 1)  # no write beyond the first byte of any file succeeds
        with pytest.raises(chromarpc.DiskFull) as refused:
            client.create_job("b", **SMALL)
        assert refused.value.retry_after_s is not None
        until_step(watcher, step=40)
        assert client.health()
        _limit_files(server, resource.RLIM_INFINITY)
        deadline = time.monotonic() + 30
        while True:
            try:
                job = client.create_job("b", **SMALL)
                break
            except chromarpc.DiskFull:
                assert time.monotonic() < deadline
        assert isinstance(list(client.watch_job(job.job_id))[-1], chromarpc.Completed)
        # What ran meanwhile ends as if nothing had been: its end was not told before it was stored.
        assert isinstance(list(watcher)[-1], chromarpc.Completed)
        assert server.stop() == 0
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        assert client.get_job(running.job_id).state == State.JOB_STATE_SUCCEEDED
        assert client.get_image_bytes(running.job_id)
