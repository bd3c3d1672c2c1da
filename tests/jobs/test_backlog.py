"""Jobs that wait: what is remembered of their adapters, and which of several devices gets them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.events import Queued
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.running_time import RunningTime
from tests.jobs.scheduling import StubTaker, scheduled

KEPT, FETCHED = "aa" * 32, "bb" * 32


class Adapters:
    """Fetches the second of two adapters."""

    def __init__(self, second: AdapterFile) -> None:
        self._second = second

    async def fetch(self, _: Any, found: FoundAdapters, **__: Any) -> FoundAdapters:
        download = SimpleNamespace(sha256=FETCHED, release=lambda: None)
        return FoundAdapters((found.files[0], self._second), (download,))  # type: ignore[arg-type]


class Store:
    """Takes what is known of adapters."""

    def __init__(self) -> None:
        self.noted: asyncio.Future[list[str | None]] = asyncio.get_running_loop().create_future()

    async def note_adapters(self, _: Job, known: list[Any]) -> None:
        self.noted.set_result([one.sha256 for one in known])


async def test_a_recovered_job_of_which_one_download_is_gone_fetches_that_one_and_remembers_both(
    tmp_path: Path,
) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(b"x")
        files.append(AdapterFile.of(tmp_path / name, "loras.0.path"))
    plan = Plan(
        model="chroma",
        served_model="chroma",
        profile="reference",
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(PlannedPrompt("a", 64, 64, 1, 4.0, 1),),
        loras=tuple(PlannedLora(f"https://example.org/{name}", 1.0) for name in ("first", "second")),
        output=PlannedOutput(ImageFormat.PNG, 95),
        preview=None,
        warnings=(),
    )
    job = Job(plan, (), Cancellation(), adapter_hashes=(KEPT, FETCHED))
    store = Store()
    backlog = Backlog(Adapters(files[1]), store, None, StepTimes(), RunningTime(), max_jobs=1)  # type: ignore[arg-type]
    backlog.open()
    model_files = CheckpointFiles(Path("t"), Path("e"), Path("k"), Path("v"))
    backlog.schedule(ScheduledJob(job, model_files, FoundAdapters((files[0], None))))
    assert await asyncio.wait_for(store.noted, 10) == [KEPT, FETCHED]
    assert (await asyncio.wait_for(backlog.next(StubTaker()), 10)).job is job


class Ends:
    """Where jobs go that this process runs no more."""

    def __init__(self) -> None:
        self.left: list[Job] = []
        self.ended: list[Job] = []

    def leave_to_next_process(self, job: Job) -> None:
        self.left.append(job)

    def end_early(self, job: Job, _: ChromaError) -> None:
        self.ended.append(job)


class Held(FoundAdapters):
    """Files that know whether they were let go."""

    released = False

    def release(self) -> None:
        self.released = True


def opened(ends: Ends | None = None, estimates: StepTimes | None = None) -> Backlog:
    """Without adapters to fetch and without a store."""
    none: Any = None
    made: Any = ends or Ends()
    backlog = Backlog(none, none, made, estimates or StepTimes(), RunningTime(), max_jobs=1000)
    backlog.open()
    return backlog


async def waiting(backlog: Backlog, *takers: StubTaker) -> list[asyncio.Task[ScheduledJob]]:
    """Devices that are free, in this order."""
    tasks = [asyncio.create_task(backlog.next(taker)) for taker in takers]
    for taker in takers:
        backlog.join(taker)
    await asyncio.sleep(0)
    return tasks


async def got(task: asyncio.Task[ScheduledJob]) -> ScheduledJob:
    return await asyncio.wait_for(task, 10)


def positions(job: ScheduledJob) -> list[tuple[int, float | None]]:
    entries = (entry.event for entry in job.job.log.entries)
    return [(event.position, event.estimated_wait_s) for event in entries if isinstance(event, Queued)]


async def test_a_job_goes_where_it_is_resident_then_where_it_is_parsed_then_to_the_least_used() -> None:
    backlog = opened()
    resident = StubTaker(used_s=9.0, resident={"m"})
    parsed = StubTaker(used_s=8.0, parsed={"m"})
    used, least = StubTaker(used_s=2.0), StubTaker(used_s=1.0)
    tasks = await waiting(backlog, used, least, parsed, resident)
    jobs = [scheduled() for _ in range(4)]
    for job in jobs:
        backlog.schedule(job)
    assert [await got(task) for task in reversed(tasks)] == [jobs[0], jobs[1], jobs[2], jobs[3]]
    assert (backlog.waiting_jobs, backlog.running_jobs) == (0, 4)
    assert all(positions(job) == [(1, 0.0)] for job in jobs)


async def test_a_job_that_only_one_kind_can_compute_waits_for_it_and_lets_others_by() -> None:
    backlog = opened()
    light, heavy = StubTaker(profiles={"light"}), StubTaker(profiles={"heavy"})
    (light_task,) = await waiting(backlog, light)
    jobs = [scheduled(profile=profile) for profile in ("heavy", "light")]
    for job in jobs:
        backlog.schedule(job)
    assert await got(light_task) is jobs[1]
    (heavy_task,) = await waiting(backlog, heavy)
    assert await got(heavy_task) is jobs[0]


async def test_a_device_whose_wait_is_cancelled_gets_no_job_and_loses_none() -> None:
    backlog = opened()
    one, other = StubTaker(), StubTaker(used_s=1.0)
    first, second = await waiting(backlog, one, other)
    first.cancel()  # and it has not noticed yet
    job = scheduled()
    backlog.schedule(job)
    assert await got(second) is job
    assert (backlog.waiting_jobs, backlog.running_jobs) == (0, 1)


async def test_a_job_that_was_handed_to_a_device_whose_wait_is_cancelled_goes_to_the_next_one_or_back() -> None:
    backlog = opened()
    one, other = StubTaker(), StubTaker(used_s=1.0)
    first, second = await waiting(backlog, one, other)
    jobs = [scheduled(), scheduled()]
    jobs[0].adapters = held = Held(())
    backlog.schedule(jobs[0])
    first.cancel()  # it was to have this job
    assert await got(second) is jobs[0]
    backlog.ran(other)
    assert held.released
    (third,) = await waiting(backlog, other)
    backlog.schedule(jobs[1])
    third.cancel()
    await asyncio.wait([third])
    assert third.cancelled()
    assert (backlog.waiting_jobs, backlog.running_jobs) == (1, 0)
    assert await backlog.next(one) is jobs[1]


async def test_a_job_that_was_handed_over_while_the_server_began_to_stop_is_left_to_the_next_process() -> None:
    ends = Ends()
    backlog = opened(ends)
    (task,) = await waiting(backlog, StubTaker())
    job = scheduled()
    backlog.schedule(job)
    backlog.close()
    backlog.leave_to_next_process()
    done, _ = await asyncio.wait([task], timeout=0.01)
    assert not done
    assert ends.left == [job.job]
    assert (backlog.waiting_jobs, backlog.running_jobs) == (0, 0)
    task.cancel()


async def test_the_job_of_a_lost_device_goes_first_keeps_its_files_and_begins_anew() -> None:
    backlog = opened()
    lost, other = StubTaker(), StubTaker(used_s=1.0)
    jobs = [scheduled("a"), scheduled("a"), scheduled("b")]
    jobs[0].adapters = held = Held(())
    for job in jobs:
        backlog.schedule(job)
    (task,) = await waiting(backlog, lost)
    assert await got(task) is jobs[0]
    jobs[0].job.pixel_steps_done = 100
    backlog.leave(lost)
    backlog.requeue(jobs[0])
    backlog.ran(lost)
    assert not held.released
    assert (backlog.waiting_jobs, backlog.running_jobs) == (3, 0)
    assert jobs[0].job.pixel_steps_done == 0
    assert positions(jobs[0])[-1][0] == 1
    assert [await backlog.next(other) for _ in jobs] == [jobs[0], jobs[2], jobs[1]]


async def test_the_job_of_a_lost_device_goes_to_a_free_one_at_once() -> None:
    backlog = opened()
    lost, other = StubTaker(), StubTaker(used_s=1.0)
    first, second = await waiting(backlog, lost, other)
    job = scheduled()
    backlog.schedule(job)
    assert await got(first) is job
    backlog.leave(lost)
    backlog.requeue(job)
    assert await got(second) is job


async def test_a_lost_device_that_waits_gets_no_job() -> None:
    backlog = opened()
    lost, other = StubTaker(), StubTaker(used_s=1.0)
    first, second = await waiting(backlog, lost, other)
    backlog.leave(lost)
    job = scheduled()
    backlog.schedule(job)
    assert await got(second) is job
    assert not first.done()
    first.cancel()


async def test_jobs_are_told_when_the_first_device_will_be_free_for_them() -> None:
    estimates = StepTimes()
    for model, seconds in (("old", 2.0), ("new", 1.0)):
        estimates.observe(model, "m", "reference", 16 * 16, seconds)
    backlog = opened(estimates=estimates)
    old, new = StubTaker("old"), StubTaker("new")
    tasks = await waiting(backlog, old, new)
    jobs = [scheduled(steps=10) for _ in range(5)]
    for job in jobs:
        backlog.schedule(job)
    assert [await got(task) for task in tasks] == jobs[:2]
    assert [positions(job)[-1] for job in jobs[2:]] == [(1, 10.0), (2, 20.0), (3, 20.0)]
    backlog.leave(new)
    backlog.requeue(jobs[1])
    backlog.schedule(last := scheduled(steps=10))
    assert positions(last) == [(5, 100.0)]


async def test_a_job_is_told_its_place_at_once_and_others_no_oftener_than_their_number_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chromarpc_server.jobs.positions.S_PER_JOB", 1000.0)
    backlog = opened()
    jobs = [scheduled("a") for _ in range(3)]
    for job in jobs:
        backlog.schedule(job)
    backlog.schedule(between := scheduled("b"))
    assert [positions(job) for job in (*jobs, between)] == [[(1, None)], [(2, None)], [(3, None)], [(2, None)]]
    assert backlog._positions._due is not None
    backlog._positions._due.cancel()
    backlog._positions._tell_all()
    assert [positions(job)[-1][0] for job in (*jobs, between)] == [1, 3, 4, 2]
