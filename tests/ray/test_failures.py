"""What may fail in a cluster, each with real Ray: the watcher's stream goes on and ends with the same picture."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from tests.ray.cluster import RayCluster, until
from tests.ray.conftest import SMALL
from tests.ray.server import STEP_TIMEOUT_S, RayServer

STEPS = 150
"""Of a job that is disturbed: some seconds."""
Start = Callable[..., RayServer]
Undisturbed = Callable[[int], str]


class Watched:
    """A job that runs, and its stream from its first event on."""

    def __init__(self, server: RayServer, steps: int = STEPS, prompt: str = "a fox") -> None:
        self._server = server
        self.events: list[Any] = []
        self.stream = server.client.generate(prompt, sample_steps=steps, **SMALL)
        for event in self.stream:
            self.events.append(event)
            if isinstance(event, chromarpc.Step) and event.step >= 3:
                break
        self.job_id = self.events[0].job_id

    @property
    def device(self) -> str:
        """Which runs it."""
        return next(event.device_id for event in reversed(self.events) if isinstance(event, chromarpc.Prepared))

    def until_restarted(self) -> float:
        """Seconds until the stream says so."""
        began = time.monotonic()
        for event in self.stream:
            self.events.append(event)
            if isinstance(event, chromarpc.Restarted):
                return time.monotonic() - began
        raise AssertionError("it was not restarted")

    def require_picture(self, expected: str, *, attempts: int = 2) -> None:
        """The stream goes on to the end: in order, with one end, and the picture that no failure has changed."""
        self.events += self.stream
        # A place in the queue is told again under its sequence, and a heartbeat has none of its own.
        kinds = (chromarpc.Queued, chromarpc.Heartbeat)
        sequences = [event.sequence for event in self.events if not isinstance(event, kinds)]
        assert sequences == sorted(set(sequences))
        assert [isinstance(event, chromarpc.Completed) for event in self.events].count(True) == 1
        assert isinstance(self.events[-1], chromarpc.Completed)
        (image,) = (event.image for event in self.events if isinstance(event, chromarpc.ImageReady))
        assert image.sha256 == expected
        restarts = sum(isinstance(event, chromarpc.Restarted) for event in self.events)
        assert restarts == attempts - 1


def drawing(start: Start) -> tuple[RayServer, Watched]:
    """A server with two devices, and a job that one of them draws."""
    server = start()
    server.await_devices(2)
    return server, Watched(server)


def test_jobs_run_on_two_hosts_at_once_and_draw_what_a_thread_draws(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server = start()
    server.await_devices(2)
    assert len({cluster.host_of(server.pid(device)).address for device in server.devices()}) == 2
    first, second = Watched(server), Watched(server)
    assert first.device != second.device
    first.require_picture(undisturbed(STEPS), attempts=1)
    second.require_picture(undisturbed(STEPS), attempts=1)


def test_an_actor_that_is_killed_gives_its_job_to_another_one(start: Start, undisturbed: Undisturbed) -> None:
    server, job = drawing(start)
    os.kill(server.pid(job.device), signal.SIGKILL)
    assert job.until_restarted() < 2
    job.require_picture(undisturbed(STEPS))
    server.await_devices(2)  # another actor in its place


def test_a_host_that_is_killed_with_all_it_has(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server, job = drawing(start)
    cluster.host_of(server.pid(job.device)).kill()
    assert job.until_restarted() < 5
    job.require_picture(undisturbed(STEPS))
    server.await_devices(1)
    # Another host takes its place, without a restart.
    cluster.mend()
    server.await_devices(2)


def test_an_actor_that_is_stopped_is_found_in_time(start: Start, undisturbed: Undisturbed) -> None:
    server, job = drawing(start)
    stopped = server.pid(job.device)
    os.kill(stopped, signal.SIGSTOP)
    assert job.until_restarted() < STEP_TIMEOUT_S + 2
    # The old one goes on, and what it says is for nobody.
    os.kill(stopped, signal.SIGCONT)
    job.require_picture(undisturbed(STEPS))
    until(lambda: not Path(f"/proc/{stopped}").exists(), "the old actor ended")


def test_a_host_that_is_stopped_is_found_in_time(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server, job = drawing(start)
    host = cluster.host_of(server.pid(job.device))
    host.signal(signal.SIGSTOP)
    assert job.until_restarted() < STEP_TIMEOUT_S + 2
    job.require_picture(undisturbed(STEPS))
    host.signal(signal.SIGCONT)


def test_a_raylet_that_is_stopped_alone_disturbs_no_job(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server, job = drawing(start)
    host = cluster.host_of(server.pid(job.device))
    os.kill(host.raylet, signal.SIGSTOP)
    try:
        job.require_picture(undisturbed(STEPS), attempts=1)
    finally:
        host.signal(signal.SIGCONT)


def test_a_server_that_is_killed_leaves_its_jobs_to_the_next_one(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server, job = drawing(start)
    left = [server.pid(device) for device in server.devices()]
    server.kill()
    with pytest.raises(chromarpc.ServerUnavailable):
        list(job.stream)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "its actors ended")
    after = start()
    after.await_devices(2)
    events = list(after.client.watch_job(job.job_id))
    assert isinstance(events[-1], chromarpc.Completed)
    (image,) = (event.image for event in events if isinstance(event, chromarpc.ImageReady))
    assert image.sha256 == undisturbed(STEPS)


def test_a_head_that_is_gone_leaves_jobs_waiting_until_it_is_back(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed
) -> None:
    server = start()
    server.await_devices(2)
    assert cluster.head is not None
    cluster.head.kill()
    server.await_health(serving=False)
    # Hosts may leave before the server is sure of the head.
    told = ('reason="Ray', "speaks to Ray")
    until(lambda: any(text in server.log for text in told), "the head is named", told=lambda: server.log)
    kept = server.client.create_job("a fox", sample_steps=20, **SMALL).job_id
    cluster.mend()
    server.await_health(serving=True)
    events = list(server.client.watch_job(kept))
    assert isinstance(events[-1], chromarpc.Completed)
    (image,) = (event.image for event in events if isinstance(event, chromarpc.ImageReady))
    assert image.sha256 == undisturbed(20)


def test_sigterm_lets_the_job_finish_and_exits_with_0(start: Start, undisturbed: Undisturbed) -> None:
    server, job = drawing(start)
    actors = [server.pid(device) for device in server.devices()]
    server.process.send_signal(signal.SIGTERM)
    job.require_picture(undisturbed(STEPS), attempts=1)
    assert server.wait() == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in actors), "its actors ended")
