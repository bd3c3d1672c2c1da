"""Steps are asked for one at a time, with a chance to stop before each but the first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from chromarpc_server.domain.errors import JobCancelled, JobDeadlineExceeded
from chromarpc_server.pipeline import DenoiseStep, finished_steps, pacing
from chromarpc_server.runtime.cancellation import Cancellation

CPU = torch.device("cpu")


def _steps(total: int, computed: list[int]) -> Iterator[DenoiseStep]:
    nothing = torch.zeros(1)
    for index in range(total):
        computed.append(index)
        yield DenoiseStep(index, total, 1.0, 1000.0, (1.0, 0.0), nothing, nothing)


def test_the_pause_comes_between_steps() -> None:
    told: list[int | str] = []
    computed: list[int] = []
    steps = finished_steps(_steps(3, computed), CPU, lambda _: told.append("pause"))
    told.extend(step.index for step in steps)
    assert told == [0, "pause", 1, "pause", 2]
    assert computed == [0, 1, 2]


def test_whoever_stops_it_in_the_pause_gets_no_further_step() -> None:
    computed: list[int] = []
    cancellation = Cancellation()
    steps = finished_steps(_steps(9, computed), CPU, cancellation.pause)
    assert [next(steps).index, next(steps).index] == [0, 1]
    cancellation.cancel(JobCancelled("enough"))
    with pytest.raises(JobCancelled):
        next(steps)
    assert computed == [0, 1]


def test_a_pause_ends_when_the_job_is_to_stop() -> None:
    cancellation = Cancellation()
    timer = threading.Timer(0.05, cancellation.cancel, [JobCancelled("enough")])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(JobCancelled):
        cancellation.pause(60)
    timer.join()
    assert time.monotonic() - begun < 30


def test_a_pause_ends_at_the_deadline() -> None:
    with pytest.raises(JobDeadlineExceeded):
        Cancellation(time.monotonic() + 0.02).pause(60)


def test_a_pause_that_is_over_already_only_looks() -> None:
    Cancellation().pause(-1.0)


class _Gpu:
    """A device that computes beside the host, both on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.busy_until_s = 0.0
        self.idle_s = 0.0
        self.ends_s: list[float] = []
        gpu = self

        class Event:
            def __init__(self, **_: object) -> None:
                self.at_s = 0.0

            def record(self, _: object) -> None:
                self.at_s = max(gpu.now_s, gpu.busy_until_s)

            def synchronize(self) -> None:
                gpu.now_s = max(gpu.now_s, self.at_s)

            def elapsed_time(self, later: Event) -> float:
                return 1000 * (later.at_s - self.at_s)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def steps(self, *each: tuple[float, float]) -> Iterator[DenoiseStep]:
        """Steps that the host gives, and the device computes, in so many seconds; work begins as it is given."""
        nothing = torch.zeros(1)
        for index, (giving_s, computing_s) in enumerate(each):
            begin_s = max(self.now_s, self.busy_until_s)
            self.idle_s += begin_s - self.busy_until_s
            self.now_s += giving_s
            self.busy_until_s = max(begin_s + computing_s, self.now_s)
            self.ends_s.append(self.busy_until_s)
            yield DenoiseStep(index, len(each), 1.0, 1000.0, (1.0, 0.0), nothing, nothing)

    def pause(self, seconds: float) -> None:
        self.now_s += max(0.0, seconds)

    def run(self, telling_s: float, *each: tuple[float, float]) -> list[float]:
        """Seconds between the end of each step and the moment it is told of."""
        late_s = []
        for step in finished_steps(self.steps(*each), torch.device("cuda"), self.pause):
            assert self.now_s >= self.ends_s[step.index], "told of before it is done"
            late_s.append(self.now_s - self.ends_s[step.index])
            self.now_s += telling_s
        return late_s


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    return _Gpu(monkeypatch)


def test_a_gpu_never_waits_for_steps_that_are_quickly_given(gpu: _Gpu) -> None:
    late_s = gpu.run(0.004, *[(0.001, 0.2)] * 10)
    assert gpu.idle_s == pytest.approx(0.004), "only after the first, whose duration nobody knew"
    assert gpu.busy_until_s == pytest.approx(2.004)
    assert max(late_s) < 0.002


def test_steps_that_take_long_to_give_are_told_of_in_time(gpu: _Gpu) -> None:
    late_s = gpu.run(0.001, *[(0.6, 0.65)] * 10)
    assert max(late_s) == pytest.approx(0)
    assert gpu.idle_s == pytest.approx(0.009), "while each was told of"


def test_it_gives_ahead_once_steps_are_quickly_given(gpu: _Gpu) -> None:
    """The first runs as it is, the second is recorded, the others are replayed."""
    late_s = gpu.run(0.001, (0.5, 0.2), (0.3, 0.2), *[(0.001, 0.2)] * 8)
    assert max(late_s) < 0.002
    assert gpu.idle_s == pytest.approx(0.003)


def test_a_step_that_ends_early_leaves_no_lasting_gap(gpu: _Gpu) -> None:
    gpu.run(0.001, *[(0.001, 0.3)] * 3, *[(0.001, 0.2)] * 7)
    assert gpu.idle_s < 0.1 + 0.01, "one step's surprise, not seven"


def test_a_stop_waits_for_what_is_being_computed(gpu: _Gpu) -> None:
    given = gpu.steps(*[(0.001, 0.2)] * 10)
    steps = finished_steps(given, torch.device("cuda"), gpu.pause)
    assert [next(steps).index for _ in range(4)] == [0, 1, 2, 3]
    steps.close()
    assert len(gpu.ends_s) == 5, "one ahead"
    assert gpu.now_s == pytest.approx(gpu.busy_until_s)
