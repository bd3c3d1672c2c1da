"""Callers take turns; residents go first within a bound."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.domain.plan import Plan, PlannedOutput
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import MAX_OVERTAKEN, JobQueue, ScheduledJob
from chromarpc_server.runtime.cancellation import Cancellation
from tests.jobs.takers import StubTaker

FILES: Any = None


def _waiting(owner: str, model: str = "m") -> ScheduledJob:
    plan = Plan(
        model=model,
        served_model=model,
        profile="reference",
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(),
        loras=(),
        output=PlannedOutput(ImageFormat.PNG, 95),
        preview=None,
        warnings=(),
    )
    return ScheduledJob(Job(plan, (), Cancellation(), owner=owner), FILES, FoundAdapters(()))


def _taken(queue: JobQueue, taker: StubTaker | None = None) -> ScheduledJob:
    scheduled = queue.take(taker or StubTaker())
    assert scheduled is not None
    return scheduled


def _drain(queue: JobQueue) -> list[ScheduledJob]:
    return [_taken(queue) for _ in range(len(queue))]


def test_a_caller_with_many_jobs_does_not_keep_another_waiting() -> None:
    queue = JobQueue()
    mine = [_waiting("a") for _ in range(3)]
    others = [_waiting("b"), _waiting("c")]
    for waiting in (*mine, *others):
        queue.add(waiting)
    assert list(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]
    assert _drain(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]


def test_a_caller_that_comes_back_waits_for_its_turn() -> None:
    queue = JobQueue()
    one, two, three = _waiting("a"), _waiting("b"), _waiting("b")
    for waiting in (one, two, three):
        queue.add(waiting)
    assert _taken(queue) is one
    again = _waiting("a")
    queue.add(again)
    assert _drain(queue) == [two, again, three]


def test_one_that_is_taken_out_leaves_the_rest_in_order() -> None:
    queue = JobQueue()
    jobs = [_waiting("a"), _waiting("a"), _waiting("b")]
    for waiting in jobs:
        queue.add(waiting)
    queue.remove(jobs[0])
    assert list(queue) == [jobs[1], jobs[2]]
    with pytest.raises(ValueError, match="not in"):
        queue.remove(jobs[0])


def test_residents_go_first_but_not_for_ever() -> None:
    queue = JobQueue()
    cold = _waiting("a", "cold")
    queue.add(cold)
    taken = []
    for _ in range(MAX_OVERTAKEN + 1):
        queue.add(_waiting("b", "warm"))
        taken.append(_taken(queue, StubTaker(resident={"warm"})))
    assert [waiting.job.plan.model for waiting in taken] == ["warm"] * MAX_OVERTAKEN + ["cold"]


@given(st.lists(st.sampled_from("abcd"), max_size=24))
def test_what_is_told_is_what_happens_and_nobody_waits_more_than_a_round(owners: list[str]) -> None:
    queue = JobQueue()
    for owner in owners:
        queue.add(_waiting(owner))
    told = list(queue)
    assert len(told) == len(queue) == len(owners)
    taken = _drain(queue)
    assert taken == told
    for index, waiting in enumerate(taken):
        before = [other.job.owner for other in taken[:index]]
        own_turns = before.count(waiting.job.owner)
        assert all(before.count(owner) <= own_turns + 1 for owner in set(before))
