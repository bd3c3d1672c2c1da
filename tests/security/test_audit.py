"""The audit log: who did what, with which outcome, and never what they asked for."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.compat.v1 import inference_service_pb2, inference_service_pb2_grpc
from chromarpc.v1 import job_service_pb2, job_service_pb2_grpc, model_service_pb2
from chromarpc.v1.model_service_pb2_grpc import ModelServiceStub
from chromarpc_server.app import serve as serve_until_signal
from chromarpc_server.observability.audit_log import AuditLog
from chromarpc_server.settings import ServerSettings
from chromarpc_server.transport.access import audit
from chromarpc_server.transport.server import SERVICES
from tests.conftest import RunningServer
from tests.faults.processes import server_process
from tests.security.conftest import TOKENS

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
REQUEST_ID = "9f0f1b1e-7f62-4f53-8a53-b0f0cf6a3a63"
Serve = Callable[..., RunningServer]
Callers = Callable[..., Path]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def watch_without_images(server: RunningServer, job_id: str, *metadata: tuple[str, str]) -> None:
    with grpc.insecure_channel(server.target) as channel:
        wanted = job_service_pb2.WatchJobRequest(job_id=job_id, omit_image_bytes=True)
        assert list(job_service_pb2_grpc.JobServiceStub(channel).WatchJob(wanted, metadata=metadata))


def cancel_by_request(server: RunningServer) -> None:
    alice = (("authorization", f"Bearer {TOKENS['alice']}"),)
    with grpc.insecure_channel(server.target) as channel:
        wanted = job_service_pb2.CancelJobRequest(request_id=REQUEST_ID)
        assert job_service_pb2_grpc.JobServiceStub(channel).CancelJob(wanted, metadata=alice)


def test_each_call_that_matters_has_its_line_and_no_other(
    serve: Serve, callers_file: Callers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "audit.jsonl"
    server = serve(callers=callers_file(), audit_log=path)
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        alice.server_info()
        alice.list_jobs()
        job_id = alice.create_job("a secret prompt", **SMALL).job_id
        list(alice.watch_job(job_id))
        watch_without_images(server, job_id, ("authorization", f"Bearer {TOKENS['alice']}"))
        alice.get_image_bytes(job_id)
        list(alice.generate("a secret prompt", **SMALL))
        list(alice.generate("a secret prompt", **SMALL, request_id=REQUEST_ID))
        cancel_by_request(server)
        for asked in ("https://user:word@127.0.0.1:1/a.safetensors?token=secret#x", f"sha256:{'0' * 64}"):
            with pytest.raises(chromarpc.StatusError):
                alice.inspect_lora(asked)
        with pytest.raises(chromarpc.LoraNotFound):
            alice.delete_lora(f"sha256:{'f' * 64}")
        alice.cancel_job(job_id)
        alice.redraw_job(job_id)
        alice.delete_job(job_id)
    with chromarpc.Client(server.target, token=TOKENS["bob"]) as bob, pytest.raises(chromarpc.JobNotFound):
        bob.get_image_bytes(job_id)
    found = lines(path)
    job = {"job_id": job_id}
    request = {"request_id": REQUEST_ID}
    assert [
        (line["event"], line["caller"], line["outcome"], {k: v for k, v in line.items() if k in _IDS})
        for line in found
    ] == [
        ("audit.image_read", "alice", "OK", job),
        ("audit.image_read", "alice", "OK", job),
        ("audit.image_read", "alice", "OK", request),
        ("audit.cancel", "alice", "OK", request),
        ("audit.inspect", "alice", "INVALID_ARGUMENT", {"host": "127.0.0.1"}),
        ("audit.inspect", "alice", "NOT_FOUND", {"sha256": "0" * 64}),
        ("audit.delete", "alice", "NOT_FOUND", {"sha256": "f" * 64}),
        ("audit.cancel", "alice", "OK", job),
        ("audit.redraw", "alice", "OK", job),
        ("audit.delete", "alice", "OK", job),
        ("audit.image_read", "bob", "NOT_FOUND", job),
    ]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in found)
    assert all(line["time"].endswith("+00:00") for line in found)
    assert "secret" not in path.read_text()
    assert not [record for record in caplog.records if record.name == audit.AUDIT_LOGGER]


_IDS = ("job_id", "request_id", "sha256", "host", "path")


def test_a_stranger_is_counted_and_its_token_is_not_written(
    serve: Serve, callers_file: Callers, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    server = serve(callers=callers_file(bob="max_calls_per_minute = 1"), audit_log=path)
    for index in range(3):
        with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError):
            ModelServiceStub(channel).GetServerInfo(
                model_service_pb2.GetServerInfoRequest(), metadata=(("authorization", f"Bearer secret{index}"),)
            )
    with chromarpc.Client(server.target, token=TOKENS["bob"]) as bob:
        bob.server_info()
        with pytest.raises(chromarpc.QuotaExceeded):
            bob.delete_job("0")
    assert server.stop() == 0  # what is counted and not written yet is written
    first, *rest = [{k: v for k, v in line.items() if k not in ("time", "level")} for line in lines(path)]
    stranger = {"event": "audit.refused", "peer": "ipv4:127.0.0.1", "outcome": "UNAUTHENTICATED", "quota": ""}
    assert first == {**stranger, "refused": 1}
    assert {**stranger, "refused": 2} in rest
    limited = {**stranger, "outcome": "RESOURCE_EXHAUSTED", "quota": "max_calls_per_minute"}
    assert {**limited, "caller": "bob", "refused": 1} in rest
    assert len(rest) == 2
    assert "secret" not in path.read_text()


def test_without_a_file_the_lines_are_in_the_ordinary_log(
    serve: Serve, callers_file: Callers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=audit.AUDIT_LOGGER)
    server = serve(callers=callers_file())
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice, pytest.raises(chromarpc.JobNotFound):
        alice.delete_job("0")
    (line,) = [record for record in caplog.records if record.name == audit.AUDIT_LOGGER]
    assert (line.getMessage(), line.__dict__["caller"], line.__dict__["job_id"]) == ("audit.delete", "alice", "0")


def test_what_the_http_api_hands_out_is_a_read_of_a_picture_too(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    server = serve(audit_log=path)
    with chromarpc.Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        job_id = client.create_job("a", **SMALL).job_id
        watch_without_images(server, job_id)
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        wanted = inference_service_pb2.DownloadInferenceImageRequest(request_id=job_id, prompt_index="0")
        assert list(stub.DownloadInferenceImage(wanted))
    assert [(line["event"], line["job_id"]) for line in lines(path)] == [("audit.image_read", job_id)]


def test_every_audited_method_exists() -> None:
    known = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    assert set(audit.METHODS) <= known
    assert set(audit.EVENTS) == set(audit.Audited)


def test_the_file_is_its_user_s_alone_and_appended_to(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(2):
        server = serve(audit_log=path)
        with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.JobNotFound):
            client.delete_job("0")
        server.stop()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(lines(path)) == 2


async def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path, capsys: Any) -> None:
    settings = ServerSettings(port=0, device="cpu", data_dir=tmp_path, audit_log=tmp_path / "none" / "audit.jsonl")
    assert await serve_until_signal(settings) == 1
    told = capsys.readouterr().err
    assert "audit.jsonl cannot be written: No such file or directory; see --audit-log" in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")  # noqa: PTH110
def test_lines_that_cannot_be_written_are_counted_in_the_ordinary_log(caplog: pytest.LogCaptureFixture) -> None:
    file = AuditLog(Path("/dev/full"))
    try:
        for _ in range(3):
            audit.log.info("audit.delete", extra={"job_id": "j"})
    finally:
        file.close()
    (line,) = [record for record in caplog.records if record.getMessage() == "audit.not_written"]
    assert (line.__dict__["problem"], line.__dict__["lost"]) == ("No space left on device", 1)
    audit.log.warning("audit.refused")
    assert caplog.records[-1].getMessage() == "audit.refused"


def test_a_line_that_a_full_disk_cuts_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, writes = tmp_path / "audit.jsonl", os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == 1:
            return real(descriptor, data[:10])
        if writes == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    file = AuditLog(path)
    try:
        monkeypatch.setattr(os, "write", write)
        for job_id in ("one", "two"):
            audit.log.info("audit.delete", extra={"job_id": job_id})
    finally:
        monkeypatch.undo()
        file.close()
    torn, whole = path.read_text().splitlines()
    assert len(torn) == 10
    assert json.loads(whole)["job_id"] == "two"


def test_a_file_that_is_moved_away_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    file = AuditLog(path)
    try:
        audit.log.info("audit.delete", extra={"job_id": "one"})
        path.rename(tmp_path / "audit.jsonl.1")
        file.reopen()
        audit.log.info("audit.delete", extra={"job_id": "two"})
        path.unlink()
        path.mkdir()
        file.reopen()  # cannot be: it goes on in the file it has
        audit.log.info("audit.delete", extra={"job_id": "three"})
    finally:
        file.close()
    assert [line["job_id"] for line in lines(tmp_path / "audit.jsonl.1")] == ["one"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_opens_the_file_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with (
        server_process(tiny_checkpoint, tmp_path / "data", "--audit-log", str(path)) as server,
        chromarpc.Client(server.target) as client,
    ):
        path.rename(tmp_path / "old")
        server.process.send_signal(signal.SIGHUP)
        while not path.exists():
            assert server.process.poll() is None
        with pytest.raises(chromarpc.JobNotFound):
            client.delete_job("0")
        assert [line["job_id"] for line in lines(path)] == ["0"]
        assert "audit.delete" not in server.log
