"""A store without room for a while: what waits for it goes on well, or is left whole to the next process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import Draining, StoreUnavailable
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.domain.models import REGISTRY
from chromarpc_server.domain.requests import GenerationRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.jobs import housekeeping, recovery
from chromarpc_server.jobs.absences import not_back
from chromarpc_server.jobs.attendance import Attendance
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import Completion
from chromarpc_server.jobs.dispatcher import Dispatcher, Left
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.recovery import SEQUENCES_A_START, Recovery, RecoveryRules
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.running_time import RunningTime

PLAN = resolve(GenerationRequest(model="chroma-mini", prompts=(PromptRequest("a fox"),)), Serving())


class ModelFiles:
    """All are here."""

    def require(self, _: object) -> Any:
        return None


class Parts:
    """A store on disk whose starts are counted only once there is room, and what recovers its jobs."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.tasks = Tasks()
        self.registry = JobRegistry(store, JobRetention())
        self.completion = Completion(store, self.registry, self.tasks)
        self.backlog = Backlog(None, store, self.completion, StepTimes(), RunningTime(), max_jobs=9)  # type: ignore[arg-type]
        self.backlog.open()
        self.recovery = Recovery(
            None,  # type: ignore[arg-type]
            ModelFiles(),  # type: ignore[arg-type]
            self.registry,
            store,
            self.backlog,
            self.completion,
            RecoveryRules(3, picture_records=True),
        )


@pytest.fixture
async def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Parts]:
    monkeypatch.setattr(recovery, "ROOM_EVERY_S", 0.001)
    store = await JobStore.open(tmp_path, JobRetention())
    for job_id in ("first", "second"):
        await store.insert(Job(PLAN, (), Cancellation(), id=job_id), needs_token=False, adapters=())
    await store.count_start()
    take_over = store.take_over

    async def without_room() -> Any:
        found, _ = await take_over()
        return [replace(stored, starts=stored.starts - 1) for stored in found], False

    monkeypatch.setattr(store, "take_over", without_room)
    made = Parts(store)
    yield made
    await made.recovery.stop()
    await made.tasks.join()
    await store.close()


async def test_watchers_find_a_job_that_waits_for_room_where_they_left_it(parts: Parts) -> None:
    await parts.recovery.recover(REGISTRY)
    job = await parts.registry.get("", "first")
    assert job.log.last_sequence >= 2 * SEQUENCES_A_START  # the process before numbered from one million on


async def test_callers_are_expected_back_to_jobs_that_waited_for_room(parts: Parts) -> None:
    expected: list[str] = []
    await parts.recovery.recover(REGISTRY)
    parts.recovery.expect_callers(lambda job: expected.append(job.id))
    assert parts.recovery._waiting is not None
    await parts.recovery._waiting
    assert expected == ["first", "second"]


async def test_a_caller_whose_job_cannot_end_for_want_of_room_is_told_so(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def without_room(*_: object) -> bool:
        raise StoreUnavailable("there is no room")

    monkeypatch.setattr(parts.store, "finish", without_room)
    attendance = Attendance(
        parts.backlog, parts.completion, parts.store, parts.tasks, RunningTime(), reattach_s=60.0
    )
    await parts.recovery.recover(REGISTRY)
    job = await parts.registry.get("", "first")
    assert isinstance(job, Job)
    parts.completion.end_early(job, not_back("its caller left"))
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await attendance.wait_until_ended(job)
    parts.completion.stop_waiting()


async def test_an_end_that_cannot_be_stored_keeps_no_store_from_being_tended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tended = asyncio.Event()

    class Keeper:
        async def store_unstored(self) -> None:
            raise StoreUnavailable("there is no room")

        async def tend(self) -> None:
            tended.set()

    monkeypatch.setattr(housekeeping, "HOUSEKEEPING_S", 0.001)
    keeping = asyncio.create_task(housekeeping.keep_house(Keeper(), Keeper()))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await tended.wait()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_stop_while_jobs_are_resumed_leaves_each_to_the_next_process(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    resuming = asyncio.Event()

    async def slowly(*_: object) -> Any:
        resuming.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(recovery, "recover_adapters", slowly)
    await parts.recovery.recover(REGISTRY)
    await resuming.wait()
    parts.backlog.close()
    await parts.recovery.stop()
    for job_id in ("first", "second"):
        job = await parts.registry.get("", job_id)
        with pytest.raises(Draining):
            async with asyncio.timeout(5):
                [entry async for entry in job.log.follow()]


async def test_an_attempt_that_was_never_counted_is_not_taken_back(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    async def without_room(_: object) -> None:
        waiting.set()
        raise StoreUnavailable("there is no room")

    await parts.recovery.recover(REGISTRY)
    assert parts.recovery._waiting is not None
    await parts.recovery._waiting
    monkeypatch.setattr(parts.store, "begin", without_room)
    dispatcher = Dispatcher(
        Device(),  # type: ignore[arg-type]
        parts.backlog,
        None,  # type: ignore[arg-type]
        parts.completion,
        parts.store,
        parts.tasks,
        max_attempts=2,
        on_lost=lambda *_: Left(),
    )
    dispatcher.start()
    await waiting.wait()
    job = await parts.registry.get("", "first")
    assert isinstance(job, Job)
    parts.backlog.close()
    parts.backlog.leave_to_next_process()
    dispatcher.stop_running()
    await dispatcher.finish_running(5)
    await dispatcher.stop()
    assert job.log.suspended
    monkeypatch.undo()
    (first, _), _ = await parts.store.take_over()
    assert first.attempts == 0


class Device:
    """Has nothing to do in these tests."""

    description = DeviceDescription("cpu", "a processor", 0, "float32")

    class snapshot:  # noqa: N801
        @staticmethod
        def holds(_: object) -> bool:
            return False

    @staticmethod
    def has_parsed(_: object) -> bool:
        return False

    @staticmethod
    async def lost() -> None:
        await asyncio.Event().wait()
