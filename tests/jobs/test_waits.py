"""How long jobs will wait, beside devices that take them one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.jobs.waits import Waits
from tests.jobs.scheduling import StubTaker, scheduled

SECONDS = {("old", "heavy"): 3.0, ("old", "light"): 2.0, ("new", "heavy"): 1.0, ("new", "light"): 0.5}
"""That a step takes on each kind of device."""
PIXELS = 16 * 16


def times(known: dict[tuple[str, str], float] = SECONDS) -> StepTimes:
    found = StepTimes()
    for (device, profile), seconds in known.items():
        found.observe(device, "m", profile, PIXELS, seconds)
    return found


@dataclass
class Played:
    """A device of the oracle."""

    taker: StubTaker
    free_at: float


def played(devices: list[Played], jobs: list[ScheduledJob]) -> list[float | None]:
    """When each job begins where each device that becomes free takes the first that it can compute."""
    waiting, begun = list(jobs), {}
    while waiting and devices:
        device = min(devices, key=lambda device: device.free_at)
        chosen = next((job for job in waiting if device.taker.can_compute(job.job)), None)
        if chosen is None:
            devices.remove(device)
            continue
        waiting.remove(chosen)
        begun[chosen] = device.free_at
        plan = chosen.job.plan
        device.free_at += SECONDS[device.taker.model, plan.profile] * plan.pixel_steps / PIXELS
    return [begun.get(job) for job in jobs]


PROFILES = st.sampled_from(["heavy", "light"])
DEVICES = st.lists(
    st.tuples(
        st.sampled_from(["old", "new"]),
        st.sampled_from([(), ("heavy",), ("light",)]),
        st.one_of(st.none(), st.tuples(PROFILES, st.integers(1, 9))),
    ),
    max_size=6,
)


@given(DEVICES, st.lists(st.tuples(PROFILES, st.integers(1, 9)), max_size=20))
def test_a_job_waits_as_long_as_devices_that_take_jobs_in_order_let_it(
    devices: list[tuple[str, tuple[str, ...], tuple[str, int] | None]], jobs: list[tuple[str, int]]
) -> None:
    # Seconds that differ a little, so that no two devices are free at the same moment and the oracle may choose.
    takers, oracle = [], []
    for index, (model, profiles, running) in enumerate(devices):
        taker = StubTaker(model, profiles=profiles)
        job = None
        left_s = 0.0
        if running is not None:
            profile, steps = running
            job = scheduled(profile=profile, steps=steps * 1000 + index).job
            left_s = SECONDS[model, profile] * (steps * 1000 + index)
        takers.append((taker, job))
        oracle.append(Played(taker, left_s))
    waiting = [
        scheduled(profile=profile, steps=steps * 997 + index) for index, (profile, steps) in enumerate(jobs)
    ]
    waits = Waits(times(), takers)
    found = [waits.add(one.job) for one in waiting]
    expected = played(oracle, waiting)
    assert [None if wait is None else round(wait, 3) for wait in found] == [
        None if wait is None else round(wait, 3) for wait in expected
    ]


def test_one_device_is_waited_for_until_all_before_are_done() -> None:
    running, jobs = scheduled(profile="heavy", steps=5).job, [scheduled(profile="light", steps=2).job] * 3
    running.pixel_steps_done = 2 * PIXELS
    waits = Waits(times(), [(StubTaker("old"), running)])
    assert [waits.add(job) for job in jobs] == [9.0, 13.0, 17.0]
    assert waits.add_all([]) == 21.0


def test_what_was_not_measured_makes_later_waits_unknown_but_not_those_for_other_devices() -> None:
    known = times({("old", "light"): 2.0})
    one = Waits(known, [(StubTaker("old"), None)])
    assert [one.add(scheduled(profile=profile).job) for profile in ("light", "heavy", "light")] == [0.0, 2.0, None]
    assert one.add_all([]) is None
    two = Waits(known, [(StubTaker("old"), scheduled(profile="heavy").job), (StubTaker("old"), None)])
    assert [two.add(scheduled(profile="light").job) for _ in range(2)] == [0.0, 2.0]


def test_without_a_device_that_can_compute_it_nothing_is_said_of_a_jobs_wait() -> None:
    assert Waits(times(), []).add(scheduled(profile="light").job) is None
    able = Waits(times(), [(StubTaker("old", profiles=("light",)), None)])
    assert able.add(scheduled(profile="heavy").job) is None
    assert able.add(scheduled(profile="light").job) == 0.0
