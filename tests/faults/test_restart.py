"""What jobs are after the server's end, orderly or not."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import chromarpc
from chromarpc.v1 import job_service_pb2
from chromarpc_server import settings as settings_module
from chromarpc_server.app import App
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.transport.access.callers_file import entry_text
from tests.conftest import RunningServer
from tests.faults import kill_nine
from tests.faults.processes import ServerProcess, server_process, until_step

Serve = Callable[..., RunningServer]
State = job_service_pb2.JobState
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 100}


def _reason(client: chromarpc.Client, job_id: str) -> str | None:
    with pytest.raises(chromarpc.StatusError) as error:
        list(client.watch_job(job_id))
    return error.value.reason


def _metrics_port(server: ServerProcess) -> str:
    while "metrics.listening" not in server.log:
        assert server.process.poll() is None
    line = next(line for line in server.log.splitlines() if "metrics.listening" in line)
    return line.rpartition("port=")[2].strip()


def _http(port: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def test_a_server_is_serving_while_a_job_that_it_resumed_runs(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models are there before the job has the device, for which it would keep them waiting."""
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        job_id = client.create_job("a", **LONG).job_id
        until_step(client.watch_job(job_id))
        server.kill()
    monkeypatch.setenv("FAULT", "hang")
    flags = ("--preload", "chroma-mini", "--metrics-port", "0")
    faulty = "tests.faults.server"
    with server_process(tiny_checkpoint, tmp_path, *flags, module=faulty, awaits_serving=False) as server:
        port = _metrics_port(server)
        while "chromarpc_running_jobs 1.0" not in _http(port, "/metrics")[1]:
            assert server.process.poll() is None, server.log
        assert _http(port, "/readyz")[0] == 200
        server.await_serving()
        with chromarpc.Client(server.target) as client:
            assert client.health()
            assert client.get_job(job_id).state == State.JOB_STATE_RUNNING
            assert any(model.resident for model in client.list_models())
            assert client.server_info().queue.running_jobs == 1


def test_a_preload_that_fails_costs_a_resumed_job_no_attempt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        job_id = client.create_job("a", **LONG).job_id
        until_step(client.watch_job(job_id))
        server.kill()
    (tmp_path / "nothing").mkdir()
    flags = ("--preload", "chroma", "--model-folder", f"chroma={tmp_path / 'nothing'}")
    with server_process(tiny_checkpoint, tmp_path, *flags, awaits_serving=False) as server:
        assert server.wait() == 1
        assert "job.resumed" in server.log
        assert "cannot start" in server.log
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
        assert client.get_job(job_id).attempt_count == 2


def _is_heartbeat(event: chromarpc.Event) -> bool:
    """One repeats the sequence of the event before it, on a machine that is slow enough."""
    return isinstance(event, chromarpc.Heartbeat)


def test_after_kill_nine_jobs_are_where_they_were_and_give_the_same_pictures(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = {**LONG, "width": 128, "height": 128}
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        ended = client.create_job("an end", seed=1, **options)
        before = [event.sequence for event in client.watch_job(ended.job_id) if not _is_heartbeat(event)]
        picture = client.get_image_bytes(ended.job_id)
        running = client.create_job("an end", seed=1, **options)
        waiting = [client.create_job("a", seed=seed, **SMALL).job_id for seed in (2, 3)]
        seen = until_step(client.watch_job(running.job_id), 5)
        server.kill()
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        after = [event.sequence for event in client.watch_job(ended.job_id) if not _is_heartbeat(event)]
        assert after == before
        assert client.get_image_bytes(ended.job_id) == picture
        # As a client of before the crash comes back.
        events = list(client.watch_job(running.job_id))
        kinds = [type(event).__name__ for event in events]
        assert kinds[:2] == ["Accepted", "Restarted"]
        assert isinstance(events[1], chromarpc.Restarted)
        assert events[1].attempt == 2
        assert events[1].sequence > seen
        done = client.get_job(running.job_id)
        assert (done.state, done.attempt_count) == (State.JOB_STATE_SUCCEEDED, 2)
        assert client.get_image_bytes(running.job_id) == picture
        ends = []
        for job_id in waiting:
            list(client.watch_job(job_id))
            ends.append(client.get_job(job_id).end_time.ToNanoseconds())
        assert ends == sorted(ends)
        assert done.end_time.ToNanoseconds() < ends[0]
        assert server.stop() == 0


def test_a_job_that_was_killed_as_often_as_it_may_fails_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    job_id = ""
    for _ in range(2):
        with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
            job_id = job_id or client.create_job("a", **LONG).job_id
            until_step(client.watch_job(job_id))
            server.kill()
    with server_process(tiny_checkpoint, tmp_path) as server, chromarpc.Client(server.target) as client:
        assert _reason(client, job_id) == "ATTEMPTS_EXHAUSTED"
        assert client.get_job(job_id).attempt_count == 2
        assert client.generate_images("the next one runs", **SMALL)


@pytest.mark.parametrize(("devices", "rounds"), [(1, 2), (2, 1)])
def test_kill_nine_at_random_moments_loses_and_doubles_nothing(tmp_path: Path, devices: int, rounds: int) -> None:
    report = kill_nine.run(rounds=rounds, seed=7, folder=tmp_path, devices=devices)
    assert report.problems == []
    assert (report.lost, report.duplicated) == (0, 0)
    assert report.accepted > 0
    assert report.succeeded + report.exhausted == report.accepted


def test_a_stop_in_good_order_keeps_jobs_and_counts_no_attempt(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a", **LONG)
        waiting = client.create_job("b", **SMALL)
        until_step(client.watch_job(job.job_id))
        told: list[BaseException] = []

        def follow() -> None:
            try:
                with chromarpc.Client(server.target) as other:
                    list(other.generate("c", **SMALL))
            except chromarpc.ChromarpcError as error:
                told.append(error)

        follower = threading.Thread(target=follow)
        follower.start()
        while len(client.list_jobs()) < 3:
            pass
        assert server.stop() == 0
        follower.join(20)
    assert isinstance(told[0], chromarpc.Draining)
    assert told[0].retry_after_s is not None
    server = serve()
    with chromarpc.Client(server.target) as client:
        assert [job.state for job in client.list_jobs()].count(State.JOB_STATE_FAILED) == 0
        client.cancel_job(job.job_id)
        assert _reason(client, job.job_id) == "CANCELLED"
        assert client.get_job(job.job_id).attempt_count <= 1
        assert isinstance(list(client.watch_job(waiting.job_id))[-1], chromarpc.Completed)


def test_a_caller_that_comes_back_keeps_its_job_and_one_that_does_not_loses_it(serve: Serve) -> None:
    server = serve()
    streams = []
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **{**LONG, "sample_steps": 150})
        for request_id in ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"):
            streams.append(client.generate("b", request_id=request_id, **SMALL))
            next(streams[-1])
        server.stop()
    server = serve(reattach_s=3.0)
    with chromarpc.Client(server.target) as client:
        back = client.generate("b", request_id="11111111-1111-4111-8111-111111111111", **SMALL)
        mine = next(back).job_id  # type: ignore[union-attr]
        (gone,) = (job.job_id for job in client.list_jobs() if job.job_id not in (mine, blocker.job_id))
        deadline = time.monotonic() + 30
        while client.get_job(gone).state != State.JOB_STATE_CANCELLED:
            assert time.monotonic() < deadline
        client.cancel_job(blocker.job_id)
        assert isinstance(list(back)[-1], chromarpc.Completed)


def test_the_time_to_come_back_does_not_run_while_models_are_loaded(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        stream = client.generate("b", request_id="11111111-1111-4111-8111-111111111111", **LONG)
        next(stream)
        server.stop()

    async def load_slowly(*_: object) -> None:
        await asyncio.sleep(0.5)  # five times the time to come back

    monkeypatch.setattr(App, "_preload", load_slowly)
    began = Engine.begin
    waiting: list[int] = []

    def begin(engine: Engine) -> None:
        waiting.append(engine.status().queued_jobs)
        began(engine)

    monkeypatch.setattr(Engine, "begin", begin)
    serve(reattach_s=0.1)
    assert waiting == [1]


def test_an_adapter_that_changed_meanwhile_fails_the_job_by_name(serve: Serve, tmp_path: Path) -> None:
    assets = Path(settings_module.__file__).parent / "assets" / "loras"
    root = tmp_path / "loras"
    root.mkdir()
    for name in ("same", "changed", "gone"):
        tensors = load_file(assets / "hollow_shapes.safetensors")
        save_file(tensors, root / f"{name}.safetensors")
    serve_mini = partial(serve, model_folder={}, lora_root=root)
    server = serve_mini()
    jobs = {}
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **LONG)
        for name in ("same", "changed", "gone"):
            jobs[name] = client.create_job("b", loras=[f"{name}.safetensors"], **SMALL).job_id
        server.stop()
    save_file({key: value * 2 for key, value in tensors.items()}, root / "changed.safetensors")
    (root / "gone.safetensors").unlink()
    server = serve_mini()
    with chromarpc.Client(server.target) as client:
        client.cancel_job(blocker.job_id)
        assert isinstance(list(client.watch_job(jobs["same"]))[-1], chromarpc.Completed)
        for name in ("changed", "gone"):
            assert _reason(client, jobs[name]) == "LORA_CHANGED"
            assert client.get_job(jobs[name]).failure.violations[0].field == "loras.0.path"


def test_prompts_that_are_not_stored_are_nowhere_and_their_job_fails_by_name(serve: Serve, tmp_path: Path) -> None:
    server = serve(store_prompts=False)
    with chromarpc.Client(server.target) as client:
        done = client.create_job("a planted secret", **SMALL)
        list(client.watch_job(done.job_id))
        assert client.get_job(done.job_id).plan.prompts[0].prompt == ""
        running = client.create_job("another planted secret", **LONG)
        assert client.get_job(running.job_id).plan.prompts[0].prompt == "another planted secret"
        server.stop()
    assert all(b"planted" not in path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    server = serve(store_prompts=False)
    with chromarpc.Client(server.target) as client:
        assert _reason(client, running.job_id) == "NOT_KEPT"
        assert client.get_image_bytes(done.job_id)


def test_a_store_in_memory_forgets_everything(serve: Serve, tmp_path: Path) -> None:
    server = serve(store="memory")
    with chromarpc.Client(server.target) as client:
        done, running = client.create_job("a", **SMALL), client.create_job("a", **LONG)
        list(client.watch_job(done.job_id))
        assert client.get_image_bytes(done.job_id)
        watcher = client.watch_job(running.job_id)
        until_step(watcher)
        server.loop.call_soon_threadsafe(server.app.stop)
        with pytest.raises(chromarpc.Draining):
            list(watcher)
        server.stop()
    assert not (tmp_path / "data" / "jobs").exists()
    server = serve(store="memory")
    with chromarpc.Client(server.target) as client:
        assert client.list_jobs() == ()


def test_a_job_that_ran_before_a_restart_has_waited_its_time(serve: Serve, tmp_path: Path) -> None:
    tokens = {name: f"chromarpc_{name}" for name in ("alice", "bob")}
    callers = tmp_path / "callers.toml"
    callers.write_text("".join(entry_text(name, token) for name, token in tokens.items()))
    server = serve(callers=callers)
    alice, bob = (partial(chromarpc.Client, token=token) for token in tokens.values())
    with alice(server.target) as first, bob(server.target) as second:
        jobs = [first.create_job("a", **LONG).job_id for _ in range(3)]
        # Admitted last, it runs before the other's third one, and waits behind it after the restart.
        running = second.create_job("b", max_queue_s=20, **LONG).job_id
        first.cancel_job(jobs[0])
        until_step(first.watch_job(jobs[1]))
        first.cancel_job(jobs[1])
        until_step(second.watch_job(running))
        server.stop()
    with sqlite3.connect(tmp_path / "data" / "jobs" / "jobs.sqlite3") as store:
        # As if half a minute had passed; rows are read without their checksums, like those of earlier versions.
        store.execute("UPDATE jobs SET admitted_kept_us = admitted_kept_us - 30000000, plan_check = NULL")
    store.close()
    server = serve(callers=callers)
    with alice(server.target) as first, bob(server.target) as second:
        until_step(first.watch_job(jobs[2]))
        first.cancel_job(jobs[2])
        assert isinstance(list(second.watch_job(running))[-1], chromarpc.Completed)
