"""`chromarpc-server store` beside a server that works, and after the data folder is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2
from tests.conftest import RunningServer
from tests.faults.processes import until_step
from tests.integration.loras.recorded import RECORDED, sha256_of

Serve = Callable[..., RunningServer]
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 60}
RUNNING = job_service_pb2.JobState.JOB_STATE_RUNNING
SUCCEEDED = job_service_pb2.JobState.JOB_STATE_SUCCEEDED


def _store(*arguments: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "chromarpc_server", "store", *map(str, arguments), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return ended.returncode, json.loads(ended.stdout)


def test_what_was_acknowledged_before_a_backup_survives_the_loss_of_the_folder(
    serve: Serve, tmp_path: Path
) -> None:
    data, saved = tmp_path / "data", tmp_path / "saved"
    server = serve(data_dir=data)
    with chromarpc.Client(server.target) as client:
        lora = client.upload_lora(RECORDED / "aitk.safetensors")
        drawn = [client.create_job("a", seed=seed, loras=[lora.path], **SMALL).job_id for seed in (1, 2)]
        for job_id in drawn:
            list(client.watch_job(job_id))
        images = {job_id: client.get_image_bytes(job_id) for job_id in drawn}
        # A tool that changes files is refused beside the server, and says so.
        for tool in (("repair",), ("forget", "--nobody")):
            code, told = _store(*tool, "--data-dir", data)
            assert code == 1
            assert "in use by another process: stop that one" in told["error"]
        cancelled = client.create_job("b", **LONG).job_id
        client.cancel_job(cancelled)
        running = client.create_job("c", seed=3, **LONG).job_id
        until_step(client.watch_job(running))
        waiting = client.create_job("d", seed=1, loras=[lora.path], **SMALL).job_id
        code, told = _store("backup", saved, "--data-dir", data)
        assert (code, told["problems"]) == (0, [])
        assert client.get_job(running).state in (RUNNING, SUCCEEDED)  # a slow backup may outlast it
    server.stop()
    shutil.rmtree(data)
    assert _store("restore", saved, "--data-dir", data)[0] == 0
    server = serve(data_dir=data)
    with chromarpc.Client(server.target) as client:
        assert {job_id: client.get_image_bytes(job_id) for job_id in drawn} == images
        assert {job.job_id for job in client.list_jobs()} == {*drawn, cancelled, running, waiting}
        with pytest.raises(chromarpc.StatusError) as ended:
            list(client.watch_job(cancelled))
        assert ended.value.reason == "CANCELLED"
        for job_id in (running, waiting):
            assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
        assert client.get_image_bytes(waiting) != b""
        assert [found.sha256 for found in client.list_loras()] == [sha256_of(RECORDED / "aitk.safetensors")]
        again = client.create_job("a", seed=1, loras=[lora.path], **SMALL).job_id
        list(client.watch_job(again))
        assert client.get_job(again).images[0].sha256 == client.get_job(drawn[0]).images[0].sha256
    assert server.stop() == 0
    assert _store("check", "--data-dir", data)[0] == 0


def test_checks_and_backups_beside_a_server_find_no_fault_and_cause_none(serve: Serve, tmp_path: Path) -> None:
    """Jobs end and are deleted all the while."""
    data = tmp_path / "data"
    server = serve(data_dir=data)
    with chromarpc.Client(server.target) as client:
        stopping = threading.Event()
        kept: list[str] = []
        failures: list[BaseException] = []

        def work() -> None:
            seed = 0
            try:
                while not stopping.is_set():
                    jobs = [client.create_job("a", seed=seed + one, **SMALL).job_id for one in range(3)]
                    seed += 3
                    for job_id in jobs:
                        list(client.watch_job(job_id))
                    kept.append(jobs[0])
                    for job_id in jobs[1:]:
                        client.delete_job(job_id)
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(2):
                before = list(kept)
                code, told = _store("check", "--data-dir", data)
                assert (code, told["problems"]) == (0, [])
                saved = tmp_path / f"saved{number}"
                code, told = _store("backup", saved, "--data-dir", data)
                assert (code, told["problems"]) == (0, [])
                code, told = _store("check", "--data-dir", saved)
                assert (code, told["problems"]) == (0, [])
                assert told["counts"]["jobs that ended"] >= len(before)
        finally:
            stopping.set()
            worker.join(60)
        assert failures == []
        for job_id in kept:
            image = client.get_job(job_id).images[0]
            assert hashlib.sha256(client.get_image_bytes(job_id)).hexdigest() == image.sha256
    assert server.stop() == 0
