"""The wall clock is set, or the process is paused, and nobody loses anything by it.

The clock is Debian's libfaketime, loaded into a real server; monotonic time goes on as it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2, lora_service_pb2, lora_service_pb2_grpc
from tests.adapters.libraries import adapter_bytes
from tests.faults.processes import ServerProcess, server_process, until_step

State = job_service_pb2.JobState
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 128, "height": 128, "sample_steps": 100}
FORWARD_S, BACK_S = 25 * 3600, -49 * 3600
"""More than the day that jobs are kept; more than two."""
MAX_QUEUE_S = 900.0
DONE, WAITS = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))

needs_faketime = pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed: apt-get install faketime")


@dataclass
class WallClock:
    """What servers that are started from here on take for the time of day."""

    path: Path
    ahead_s: int = 0

    def step(self, seconds: int) -> None:
        """Sets the clock, also that of servers that run."""
        self.ahead_s += seconds
        # Read while it is written: what is there has to be whole at any moment.
        written = self.path.with_suffix(".new")
        written.write_text(f"{self.ahead_s:+d}\n")
        written.replace(self.path)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WallClock]:
    made = WallClock(tmp_path / "clock")
    made.step(0)
    monkeypatch.setenv("LD_PRELOAD", str(LIBRARIES[-1]))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(made.path))
    monkeypatch.setenv("FAKETIME_CACHE_DURATION", "1")  # reading it each time takes longer than all the rest
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("NO_FAKE_STAT", "1")  # files keep the times that they got, as after a real step
    yield made
    monkeypatch.undo()


@contextlib.contextmanager
def clocked_server(*arguments: Any) -> Iterator[ServerProcess]:
    """A server under the clock."""
    with server_process(*arguments, threads=1) as server:
        pid = server.process.pid
        yield server
    for left in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):  # which libfaketime leaves behind
        Path("/dev/shm", left).unlink(missing_ok=True)


@dataclass
class Kept:
    """What a client was told, and goes on asking for."""

    client: chromarpc.Client
    images: dict[str, str] = field(default_factory=dict)
    """Hash of each ended job's image."""
    running: str = ""
    waiting: str = ""

    def prepare(self) -> None:
        """One job has ended, one runs, one waits."""
        self.draw(request_id=DONE)
        self.occupy()

    def draw(self, request_id: str | None = None) -> str:
        """A job from beginning to end. Returns its id."""
        job_id = self.client.create_job("a", request_id=request_id, **SMALL).job_id
        assert isinstance(list(self.client.watch_job(job_id))[-1], chromarpc.Completed)
        self.images[job_id] = hashlib.sha256(self.client.get_image_bytes(job_id)).hexdigest()
        return job_id

    def occupy(self) -> None:
        """A job runs, and one waits that must not wait for ever."""
        self.running = self.client.create_job(["b"] * 10, **LONG).job_id
        until_step(self.client.watch_job(self.running))
        self.waiting = self.client.create_job("a", request_id=WAITS, max_queue_s=MAX_QUEUE_S, **SMALL).job_id

    def await_step(self, clock: WallClock) -> None:
        """Returns once the server has the time of the clock."""
        while True:
            extra = self.client.create_job("c", **SMALL)
            self.client.cancel_job(extra.job_id)
            if abs(extra.create_time.ToSeconds() - time.time() - clock.ahead_s) < 600:
                return

    def require_all(self) -> None:
        """Everything is as it was."""
        done = next(iter(self.images))
        for _ in range(5):  # each of them has the store forget what is too old
            assert self.client.create_job("a", request_id=DONE, **SMALL).job_id == done
            extra = self.client.create_job("c", **SMALL)
            self.client.cancel_job(extra.job_id)
        assert (
            self.client.create_job("a", request_id=WAITS, max_queue_s=MAX_QUEUE_S, **SMALL).job_id == self.waiting
        )
        assert self.client.get_job(self.waiting).state == State.JOB_STATE_QUEUED
        listed = {job.job_id: job for job in self.client.list_jobs()}
        for job_id, sha256 in self.images.items():
            assert listed[job_id].state == State.JOB_STATE_SUCCEEDED
            assert hashlib.sha256(self.client.get_image_bytes(job_id)).hexdigest() == sha256

    def finish(self) -> None:
        """What waits is drawn, and new jobs are, and can be read."""
        self.client.cancel_job(self.running)
        assert isinstance(list(self.client.watch_job(self.waiting))[-1], chromarpc.Completed)
        assert self.draw() in {job.job_id for job in self.client.list_jobs()}


@needs_faketime
def test_a_step_of_the_clock_forgets_nothing(tiny_checkpoint: Path, tmp_path: Path, clock: WallClock) -> None:
    with (
        clocked_server(tiny_checkpoint, tmp_path / "data") as server,
        chromarpc.Client(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        kept, upload = Kept(client), Upload(lora_service_pb2_grpc.LoraServiceStub(channel))
        kept.prepare()
        upload.send()
        for step_s in (FORWARD_S, BACK_S):
            clock.step(step_s)
            kept.await_step(clock)
            kept.require_all()
            upload.send()
        kept.finish()
        clock.step(FORWARD_S)
        kept.await_step(clock)
        for job_id in kept.images:
            assert client.get_image_bytes(job_id)
        assert upload.finalize()
        assert server.stop() == 0


@needs_faketime
def test_a_step_of_the_clock_while_the_server_is_down_forgets_nothing(
    tiny_checkpoint: Path, tmp_path: Path, clock: WallClock
) -> None:
    def run(then: Callable[[Kept], None], kept: Kept | None = None) -> Kept:
        with (
            clocked_server(tiny_checkpoint, tmp_path / "data", "--grace-s", "0") as server,
            chromarpc.Client(server.target) as client,
        ):
            now = Kept(client) if kept is None else Kept(client, kept.images, kept.running, kept.waiting)
            then(now)
            assert server.stop() == 0
        return now

    def require(now: Kept) -> None:
        now.await_step(clock)
        now.require_all()

    def require_and_finish(now: Kept) -> None:
        require(now)
        now.finish()

    kept = run(Kept.prepare)
    clock.step(FORWARD_S)
    kept = run(require, kept)
    clock.step(BACK_S)
    run(require_and_finish, kept)


@dataclass
class Upload:
    """An adapter that is sent in pieces."""

    stub: Any
    data: bytes = adapter_bytes(1)
    upload_id: str = ""
    sent: int = 0

    def send(self) -> None:
        """One more piece; the first one begins the upload."""
        if not self.upload_id:
            request = lora_service_pb2.CreateLoraUploadRequest(filename="a.safetensors", size_bytes=len(self.data))
            self.upload_id = self.stub.CreateLoraUpload(request).upload_id
        chunk = self.data[self.sent : self.sent + 40]
        append = lora_service_pb2.AppendLoraUploadRequest(upload_id=self.upload_id, offset=self.sent, chunk=chunk)
        self.sent = self.stub.AppendLoraUpload(append).next_offset

    def finalize(self) -> bool:
        """Sends the rest. Returns whether the adapter is kept."""
        while self.sent < len(self.data):
            self.send()
        sha256 = hashlib.sha256(self.data).hexdigest()
        request = lora_service_pb2.FinalizeLoraUploadRequest(upload_id=self.upload_id, sha256=sha256)
        return bool(self.stub.FinalizeLoraUpload(request).lora.sha256 == sha256)


def test_a_paused_process_is_no_hung_device(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As `docker pause`, a suspended laptop, or a host that moves a machine do it."""
    with (
        server_process(tiny_checkpoint, tmp_path, "--step-timeout-s", "1.5", threads=1) as server,
        chromarpc.Client(server.target) as client,
    ):
        job_id = client.create_job("a", **{**LONG, "sample_steps": 40}).job_id
        for step in (1, 5):
            until_step(client.watch_job(job_id), step)
            _pause(server, 4)
        assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
        assert client.get_job(job_id).attempt_count == 1
        assert server.stop() == 0


def _pause(server: ServerProcess, seconds: float) -> None:
    server.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)  # what is tested is that time passes
    finally:
        server.process.send_signal(signal.SIGCONT)
