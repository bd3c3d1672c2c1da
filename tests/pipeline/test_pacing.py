"""Steps are asked for one at a time, with a chance to stop before each but the first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from chromarpc_server.domain.errors import JobCancelled, JobDeadlineExceeded
from chromarpc_server.engine.job import Cancellation
from chromarpc_server.pipeline import DenoiseStep, finished_steps

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
