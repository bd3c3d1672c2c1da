"""What is learned from measured steps, whatever a step of a sampler costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.events import Step
from chromarpc_server.jobs.attempt import Attempt, AttemptRecorder
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.waits import Waits
from chromarpc_server.runtime.cancellation import Cancellation
from tests.jobs.scheduling import StubTaker, scheduled

CARD = DeviceDescription("card", "card", 1, "float32", ())


def _job(sampler: str, steps: int) -> Job:
    plan = scheduled(steps=steps).job.plan
    prompts = (replace(plan.prompts[0], sampler=sampler),)
    return Job(replace(plan, prompts=prompts), (), Cancellation())


def test_what_one_samplers_steps_took_foretells_those_of_another() -> None:
    none: Any = None
    estimates = StepTimes()
    recorder = AttemptRecorder(none, none, none, none, estimates, ())
    job = _job("heun", 10)
    recorder.take(Attempt(job, CARD), Step(0, 1, 10, 1.0, 1000.0, 4.0, None))
    assert (job.done_steps, job.pixel_steps_done) == (1, 2 * 16 * 16)

    def wait_s(behind: Job) -> float | None:
        waits = Waits(estimates, [(StubTaker(), None)])
        waits.add(behind)
        return waits.add(_job("euler", 1))

    assert wait_s(_job("euler", 10)) == 20.0
    assert wait_s(_job("heun", 10)) == 40.0
    assert wait_s(_job("heunpp2", 10)) == 60.0


def test_a_schedule_of_more_steps_than_were_asked_for_leaves_no_time_below_nothing() -> None:
    estimates = StepTimes()
    estimates.observe("card", "m", "reference", 16 * 16, 1.0)
    running = _job("euler", 10)
    running.pixel_steps_done = 11 * 16 * 16
    assert Waits(estimates, [(StubTaker(), running)]).add(_job("euler", 1)) == 0.0
