"""Several devices: jobs run at once, and one that is lost takes no job with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from tests.faults.processes import server_process, until_step

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 4, "seed": 3}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
TWO = ("--devices", "cpu,cpu")
Start = Callable[..., Any]


@pytest.fixture
def faulty(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(fault: str, *flags: str, times: int = 1) -> Any:
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FAULT_TIMES", str(times))
        return server_process(tiny_checkpoint, tmp_path, *TWO, *flags, module="tests.faults.server", threads=1)

    return start


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the image that every test here draws, as one device draws it."""
    flags = ("--store", "memory")
    with (
        server_process(tiny_checkpoint, tmp_path_factory.mktemp("undisturbed"), *flags, threads=1) as server,
        chromarpc.Client(server.target) as client,
    ):
        return client.generate_images("a", picture_record=False, **SMALL)[0].sha256


def test_two_devices_run_two_jobs_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        server_process(tiny_checkpoint, tmp_path, *TWO, threads=1) as server,
        chromarpc.Client(server.target) as client,
    ):
        first, second = client.generate("a", **LONG), client.generate("b", **LONG)
        until_step(first, 2)
        until_step(second, 2)  # it began although the first one goes on
        third = client.create_job("c", **SMALL).job_id
        assert client.get_job(third).queue_position == 1
        first.close()
        assert isinstance(list(client.watch_job(third))[-1], chromarpc.Completed)  # while the second one goes on
        until_step(second, 3)


@pytest.mark.parametrize(
    ("fault", "flags"),
    [("device_lost", ()), ("hang", ("--step-timeout-s", "1")), ("thread_ends", ())],
)
def test_a_lost_device_gives_its_job_to_another_one_on_the_same_stream(
    faulty: Start, undisturbed: str, fault: str, flags: tuple[str, ...]
) -> None:
    with faulty(fault, *flags) as server, chromarpc.Client(server.target) as client:
        events = list(client.generate("a", picture_record=False, **SMALL))
        assert isinstance(events[-1], chromarpc.Completed)
        sequences = [event.sequence for event in events if not isinstance(event, chromarpc.Heartbeat)]
        assert sequences == sorted(set(sequences))
        (restarted,) = (event for event in events if isinstance(event, chromarpc.Restarted))
        assert (restarted.attempt, restarted.bits_may_differ) == (2, False)
        assert restarted.moved_from in ("cpu:0", "cpu:1")
        before = [event for event in events if event.sequence < restarted.sequence]
        assert any(isinstance(event, chromarpc.Step) for event in before)
        (image,) = (event for event in events if isinstance(event, chromarpc.ImageReady))
        assert image.image.sha256 == undisturbed
        assert client.get_job(events[0].job_id).attempt_count == 2
        assert client.health() is chromarpc.HealthStatus.SERVING  # readiness stays
        assert "device.out" in server.log
        assert client.generate_images("a", picture_record=False, **SMALL)[0].sha256 == undisturbed
        assert server.stop() == 0  # also beside a thread that hangs


def test_the_process_ends_once_every_device_is_lost_and_keeps_its_jobs(
    faulty: Start, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    three = ("--job-attempts", "3")
    with faulty("device_lost", *three, times=2) as server, chromarpc.Client(server.target) as client:
        running = client.create_job("a", **SMALL).job_id
        with pytest.raises(chromarpc.StatusError) as told:
            list(client.watch_job(running))
        assert told.value.reason == "DEVICE_LOST"
        assert server.wait() == 70
    with server_process(tiny_checkpoint, tmp_path, *three) as server, chromarpc.Client(server.target) as client:
        assert isinstance(list(client.watch_job(running))[-1], chromarpc.Completed)
        assert client.get_job(running).attempt_count == 3


def test_a_job_that_takes_devices_with_it_is_given_up_before_all_are_gone(faulty: Start) -> None:
    with faulty("device_lost", "--job-attempts", "1") as server, chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.StatusError) as told:
            list(client.generate("a", **SMALL))
        assert told.value.reason == "ATTEMPTS_EXHAUSTED"
        assert client.generate_images("a", **SMALL)  # on the other one
        assert server.stop() == 0
