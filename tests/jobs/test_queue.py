"""Callers take turns; residents go first within a bound; what a device cannot compute holds nobody up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chromarpc_server.jobs.queue import LOOK_AHEAD, MAX_OVERTAKEN, JobQueue, ScheduledJob
from tests.jobs.scheduling import StubTaker, scheduled


def _taken(queue: JobQueue, taker: StubTaker | None = None) -> ScheduledJob:
    taken = queue.take(taker or StubTaker())
    assert taken is not None
    return taken


def _drain(queue: JobQueue) -> list[ScheduledJob]:
    return [_taken(queue) for _ in range(len(queue))]


def test_a_caller_with_many_jobs_does_not_keep_anotherscheduled() -> None:
    queue = JobQueue()
    mine = [scheduled("a") for _ in range(3)]
    others = [scheduled("b"), scheduled("c")]
    for waiting in (*mine, *others):
        queue.add(waiting)
    assert list(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]
    assert _drain(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]


def test_a_caller_that_comes_back_waits_for_its_turn() -> None:
    queue = JobQueue()
    one, two, three = scheduled("a"), scheduled("b"), scheduled("b")
    for waiting in (one, two, three):
        queue.add(waiting)
    assert _taken(queue) is one
    again = scheduled("a")
    queue.add(again)
    assert _drain(queue) == [two, again, three]


def test_one_that_is_taken_out_leaves_the_rest_in_order() -> None:
    queue = JobQueue()
    jobs = [scheduled("a"), scheduled("a"), scheduled("b")]
    for waiting in jobs:
        queue.add(waiting)
    queue.remove(jobs[0])
    assert list(queue) == [jobs[1], jobs[2]]
    with pytest.raises(ValueError, match="not in"):
        queue.remove(jobs[0])


def test_residents_go_first_but_not_for_ever() -> None:
    queue = JobQueue()
    cold = scheduled("a", "cold")
    queue.add(cold)
    taken = []
    for _ in range(MAX_OVERTAKEN + 1):
        queue.add(scheduled("b", "warm"))
        taken.append(_taken(queue, StubTaker(resident={"warm"})))
    assert [waiting.job.plan.model for waiting in taken] == ["warm"] * MAX_OVERTAKEN + ["cold"]


@given(st.lists(st.sampled_from("abcd"), max_size=24))
def test_what_is_told_is_what_happens_and_nobody_waits_more_than_a_round(owners: list[str]) -> None:
    queue = JobQueue()
    for owner in owners:
        queue.add(scheduled(owner))
    told = list(queue)
    assert len(told) == len(queue) == len(owners)
    taken = _drain(queue)
    assert taken == told
    for index, waiting in enumerate(taken):
        before = [other.job.owner for other in taken[:index]]
        own_turns = before.count(waiting.job.owner)
        assert all(before.count(owner) <= own_turns + 1 for owner in set(before))


HEAVY, LIGHT = StubTaker(profiles={"heavy"}), StubTaker(profiles={"light"})
BOTH = StubTaker()


def test_a_device_takes_what_it_can_compute_and_nothing_else() -> None:
    queue = JobQueue()
    heavy, light = scheduled("a", profile="heavy"), scheduled("a", profile="light")
    queue.add(heavy)
    assert queue.take(LIGHT) is None
    queue.add(light)
    assert queue.take(LIGHT) is light
    assert queue.take(HEAVY) is heavy
    assert queue.take(BOTH) is None
    assert len(queue) == 0


def test_what_a_device_cannot_compute_is_not_put_off_by_its_callers_later_jobs() -> None:
    queue = JobQueue()
    heavy = scheduled("a", profile="heavy")
    queue.add(heavy)
    for _ in range(6):
        queue.add(scheduled("a", profile="light"))
        queue.add(scheduled("b", profile="light"))
    assert [_taken(queue, LIGHT).job.owner for _ in range(3)] == ["a", "b", "a"]
    assert _taken(queue, BOTH) is heavy
    assert [_taken(queue, BOTH).job.owner for _ in range(3)] == ["b", "a", "b"]


def test_a_caller_whose_jobs_were_passed_over_has_one_turn_for_all_of_them() -> None:
    queue = JobQueue()
    for _ in range(3):
        queue.add(scheduled("a", profile="heavy"))
    queue.add(scheduled("a", profile="light"))
    queue.add(scheduled("b", profile="heavy"))
    _taken(queue, LIGHT)
    assert [_taken(queue, HEAVY).job.owner for _ in range(3)] == ["a", "b", "a"]


def test_a_job_that_is_put_back_goes_first_and_its_caller_has_no_other_turn_before_the_next() -> None:
    queue = JobQueue()
    mine, others = [scheduled("a") for _ in range(3)], [scheduled("b"), scheduled("c")]
    for waiting in (*mine, *others):
        queue.add(waiting)
    taken = _taken(queue)
    queue.put_back(taken)
    assert list(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]
    assert _drain(queue) == [mine[0], others[0], others[1], mine[1], mine[2]]


def test_residents_are_looked_for_no_farther_than_so_many_jobs() -> None:
    queue = JobQueue()
    jobs = [scheduled("a", "cold") for _ in range(LOOK_AHEAD)]
    for waiting in (*jobs, scheduled("a", "warm")):
        queue.add(waiting)
    warm = StubTaker(resident={"warm"})
    assert _taken(queue, warm) is jobs[0]
    assert _taken(queue, warm).job.plan.model == "warm"


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["heavy", "light"])),
        st.sampled_from([HEAVY, LIGHT, BOTH]),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_on_several_kinds_of_devices_every_job_runs_once_and_nobody_is_passed_over_twice_by_another(
    operations: list[tuple[str, str] | StubTaker],
) -> None:
    queue = JobQueue()
    waiting: list[ScheduledJob] = []
    passed: Counter[tuple[ScheduledJob, StubTaker, str]] = Counter()
    """Of a job that is its caller's next for a kind of device: how often that took one of another caller since its
    own caller had a turn on any device."""
    for operation in (*operations, *[BOTH] * len(operations)):
        if isinstance(operation, tuple):
            owner, profile = operation
            waiting.append(scheduled(owner, profile=profile))
            queue.add(waiting[-1])
            continue
        able = [job for job in waiting if operation.can_compute(job.job)]
        taken = queue.take(operation)
        if not able:
            assert taken is None
            continue
        assert taken in able
        first: dict[str, ScheduledJob] = {}
        for job in able:
            first.setdefault(job.job.owner, job)
        assert taken is first[taken.job.owner]
        for job in first.values():
            passed[job, operation, taken.job.owner] += job is not taken
        assert max(passed.values(), default=0) <= 1
        for key in [key for key in passed if key[0].job.owner == taken.job.owner]:
            del passed[key]
        waiting.remove(taken)
        assert set(queue) == set(waiting)
        assert [queue.position(job) for job in queue] == list(range(1, len(queue) + 1))
    assert not waiting


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("klmn")), max_size=40),
    st.lists(st.sets(st.sampled_from("klmn"), max_size=2), min_size=1, max_size=4),
)
def test_on_several_devices_none_is_overtaken_more_often_than_is_allowed(
    jobs: list[tuple[str, str]], resident: list[set[str]]
) -> None:
    queue = JobQueue()
    for owner, model in jobs:
        queue.add(scheduled(owner, model))
    takers = [StubTaker(resident=models) for models in resident]
    taken = [_taken(queue, takers[turn % len(takers)]) for turn in range(len(jobs))]
    assert len(set(taken)) == len(jobs)
    assert all(waiting.job.overtaken <= MAX_OVERTAKEN for waiting in taken)
