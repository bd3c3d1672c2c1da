"""A disk that is full to the last byte: nothing new is taken, nothing is lost, all goes on once there is room.

The disk is a small tmpfs. Where none can be mounted these tests are skipped; what SQLite and the store do without
room is then seen by the ones with injected errors, in `test_store.py` and `tests/jobs/store`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2, lora_service_pb2, lora_service_pb2_grpc
from chromarpc_server.jobs import housekeeping
from tests.conftest import RunningServer
from tests.faults.processes import until_step

Serve = Callable[..., RunningServer]
State = job_service_pb2.JobState
MIB = 2**20
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 128, "height": 128, "sample_steps": 60}
ROOMY: dict[str, Any] = {**SMALL, "width": 256, "height": 256}
"""An image that is larger than what SQLite writes to delete its row, as usual ones are."""
RESERVE_BYTES = 16 * MIB
PATIENCE_S = 60.0


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few MiB."""

    folder: Path

    @property
    def data_dir(self) -> Path:
        """For a server."""
        return self.folder / "data"

    @property
    def free_bytes(self) -> int:
        """What may still be written."""
        return shutil.disk_usage(self.folder).free

    def fill(self, leave_bytes: int = 0) -> None:
        """Something else takes the room, to the last byte unless told otherwise."""
        with (self.folder / "filler").open("ab") as file, contextlib.suppress(OSError):
            while (room := self.free_bytes - leave_bytes) > 0:
                file.write(bytes(min(room, MIB)))
                file.flush()
        if not leave_bytes:
            with (
                pytest.raises(OSError, match="No space left") as full,
                (self.folder / "probe").open("wb") as probe,
            ):
                probe.write(bytes(4096))
            assert full.value.errno == errno.ENOSPC
            (self.folder / "probe").unlink()

    def make_room(self) -> None:
        """What took the room goes away."""
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: whatever a failed test left open there goes with it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def on_disk(serve: Serve, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Servers whose data lies on the small disk, and that look for room more often."""
    monkeypatch.setattr(housekeeping, "HOUSEKEEPING_S", 0.3)

    def start(**settings: Any) -> RunningServer:
        return serve(data_dir=disk.data_dir, **{"disk_reserve": RESERVE_BYTES, **settings})

    return start


def _draw(client: chromarpc.Client, **options: Any) -> str:
    """A job from beginning to end. Returns its id."""
    job_id = client.create_job("a", **{**SMALL, "seed": 1, **options}).job_id
    assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
    return job_id


def _require_image(client: chromarpc.Client, job_id: str) -> None:
    image = client.get_job(job_id).images[0]
    assert hashlib.sha256(client.get_image_bytes(job_id)).hexdigest() == image.sha256


def _require_refusal(client: chromarpc.Client, target: str) -> None:
    """Neither a job nor an upload is taken, and the caller is told what to do."""
    with pytest.raises(chromarpc.ResourceExhausted) as refused:
        client.create_job("b", **SMALL)
    assert refused.value.reason == "DISK_FULL"
    assert refused.value.retry_after_s is not None
    assert "delete" in str(refused.value)
    request = lora_service_pb2.CreateLoraUploadRequest(filename="a.safetensors", size_bytes=1000)
    with grpc.insecure_channel(target) as channel:
        stub = lora_service_pb2_grpc.LoraServiceStub(channel)
        with pytest.raises(grpc.RpcError) as upload:
            stub.CreateLoraUpload(request)
    assert upload.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert any(b"DISK_FULL" in value for _, value in upload.value.trailing_metadata() if isinstance(value, bytes))


def _await(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _once_there_is_room(client: chromarpc.Client) -> str:
    """A new job, as soon as the server takes one. Returns its id."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _draw(client)
        except chromarpc.ResourceExhausted:
            assert time.monotonic() < deadline


def test_jobs_and_uploads_are_refused_while_there_is_still_room_for_what_runs(
    on_disk: Serve, disk: SmallDisk
) -> None:
    server = on_disk()
    with chromarpc.Client(server.target) as client:
        done = _draw(client)
        running, waiting = client.create_job("a", **LONG).job_id, client.create_job("a", **SMALL).job_id
        until_step(client.watch_job(running))
        disk.fill(leave_bytes=RESERVE_BYTES // 2)
        _require_refusal(client, server.target)
        for job_id in (running, waiting):
            assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
            _require_image(client, job_id)
        _require_image(client, done)
        disk.make_room()
        _draw(client)
    assert server.stop() == 0


def test_deleting_frees_room_on_a_disk_that_has_none(on_disk: Serve, disk: SmallDisk) -> None:
    server = on_disk()
    with chromarpc.Client(server.target) as client:
        jobs = [_draw(client, **ROOMY, seed=seed) for seed in range(4)]
        disk.fill()
        for job_id in jobs[:3]:
            before = disk.free_bytes
            client.delete_job(job_id)
            assert disk.free_bytes > before
            disk.fill()  # another process takes it at once, and what the server held for deletions with it
            with pytest.raises(chromarpc.NotFound):
                client.get_job(job_id)
        _require_image(client, jobs[3])
        disk.make_room()
        again = _once_there_is_room(client)
    assert server.stop() == 0
    server = on_disk()
    with chromarpc.Client(server.target) as client:
        assert [job.job_id for job in client.list_jobs()] == [again, jobs[3]]
    assert server.stop() == 0


def test_retention_frees_room_on_a_disk_that_has_none(on_disk: Serve, disk: SmallDisk) -> None:
    server = on_disk(job_keep_s=6.0)
    with chromarpc.Client(server.target) as client:
        for _ in range(2):
            _draw(client)
        images = disk.data_dir / "jobs" / "images"
        disk.fill()
        assert list(images.glob("*/*"))
        _await(lambda: not list(images.glob("*/*")))
        assert client.list_jobs() == ()
    assert server.stop() == 0


def test_a_server_starts_on_a_full_disk_serves_what_it_has_and_goes_on_once_there_is_room(
    on_disk: Serve, disk: SmallDisk
) -> None:
    server = on_disk()
    with chromarpc.Client(server.target) as client:
        done, other = _draw(client), _draw(client, **ROOMY)
        running, waiting = client.create_job("a", **LONG).job_id, client.create_job("a", **SMALL).job_id
        until_step(client.watch_job(running))
    assert server.stop() == 0
    disk.fill()
    server = on_disk()
    disk.fill()  # what the start may have given up is taken too
    with chromarpc.Client(server.target) as client:
        for job_id in (done, other):
            _require_image(client, job_id)
        _require_refusal(client, server.target)
        client.delete_job(other)
        disk.fill()
        # What waits is not given up for want of room.
        ends = (State.JOB_STATE_FAILED, State.JOB_STATE_CANCELLED)
        assert all(client.get_job(job_id).state not in ends for job_id in (running, waiting))
        assert server.stop() == 0
    server = on_disk()
    with chromarpc.Client(server.target) as client:
        assert all(client.get_job(job_id).state not in ends for job_id in (running, waiting))
        disk.make_room()
        for job_id in (running, waiting):
            assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
            _require_image(client, job_id)
        _require_image(client, done)
        _once_there_is_room(client)
        with pytest.raises(chromarpc.NotFound):
            client.get_job(other)
    assert server.stop() == 0
