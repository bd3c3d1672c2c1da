"""Between the queue and a device: jobs that were taken and not begun, and what a lost device leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import ChromaError, DeviceError, DeviceLost, StoreUnavailable
from chromarpc_server.domain.events import ImageHeader
from chromarpc_server.jobs.attempt import Attempt, AttemptRecorder
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.dispatcher import Dispatcher, Left
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.fleet import Fleet, Preload
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.device import Device
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import EncodedImage
from tests.jobs.scheduling import scheduled

NONE: Any = None
CARD = DeviceDescription("card", "card", 1, "float32", ())


class Idle:
    """A device that has not begun anything yet, and can be lost."""

    def __init__(self) -> None:
        self.description = CARD
        self.snapshot = CacheSnapshot()
        self.losing: asyncio.Future[DeviceError] = asyncio.get_running_loop().create_future()
        self.loaded: list[str] = []
        self.loads: Callable[[], Any] | None = None
        self.ran = 0

    async def lost(self) -> DeviceError:
        return await asyncio.shield(self.losing)

    async def load(self, model_id: str, *_: Any) -> None:
        if self.loads is not None:
            await self.loads()
        self.loaded.append(model_id)

    async def run(self, *_: Any) -> Any:
        self.ran += 1
        raise self.losing.result()

    def has_parsed(self, _: Any) -> bool:
        return True

    def memory_used_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Ends:
    """Where jobs go that this process runs no more."""

    is_stopping = False

    def __init__(self) -> None:
        self.left: list[Job] = []

    def leave_to_next_process(self, job: Job) -> None:
        self.left.append(job)

    async def stops_meanwhile(self) -> bool:
        await asyncio.sleep(0)
        return False


class Begun:
    """A store that counts attempts."""

    is_durable = True

    async def begin(self, _: Job) -> None:
        pass


def backlog_of(ends: Ends) -> Backlog:
    made: Any = ends
    backlog = Backlog(NONE, NONE, made, StepTimes(), RunningTime(), max_jobs=10)
    backlog.open()
    return backlog


def dispatcher_of(device: Idle, backlog: Backlog, on_lost: Any = None) -> Dispatcher:
    store: Any = Begun()
    made: Any = device
    return Dispatcher(
        made,
        backlog,
        NONE,
        NONE,
        store,
        Tasks(),
        max_attempts=3,
        on_lost=on_lost or (lambda *_: Left(more_may_come=True)),
    )


async def taken(dispatcher: Dispatcher, backlog: Backlog, device: Idle) -> Any:
    """The dispatcher's wait for a job, which it was given and does not know of yet; and the job."""
    watch: Any = device.losing
    waiting = asyncio.create_task(dispatcher._next(watch))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    job = scheduled()
    backlog.schedule(job)
    await asyncio.sleep(0)  # the queue's side of it is done
    assert backlog.running_jobs == 1
    assert not waiting.done()
    return waiting, job


async def test_a_wait_that_is_cancelled_as_it_ends_loses_no_job() -> None:
    backlog, device = backlog_of(Ends()), Idle()
    waiting, job = await taken(dispatcher_of(device, backlog), backlog, device)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (backlog.waiting, backlog.running_jobs) == ((job,), 0)


async def test_a_job_that_was_taken_as_the_server_begins_to_stop_is_left_to_the_next_process() -> None:
    ends, device = Ends(), Idle()
    backlog = backlog_of(ends)
    waiting, job = await taken(dispatcher_of(device, backlog), backlog, device)
    backlog.close()
    backlog.leave_to_next_process()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert ends.left == [job.job]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_device_that_is_lost_as_it_takes_a_job_costs_no_attempt() -> None:
    backlog, device = backlog_of(Ends()), Idle()
    waiting, job = await taken(dispatcher_of(device, backlog), backlog, device)
    device.losing.set_result(DeviceLost("it fell off the bus"))
    assert await asyncio.wait_for(waiting, 10) is None
    assert backlog.waiting == (job,)


class Full:
    """A store without room until `room` is set."""

    is_durable = True

    def __init__(self) -> None:
        self.tried = asyncio.Event()
        self.has_room = False
        self.kept: list[bytes] = []

    async def put_image(self, _: Job, __: ImageHeader, data: bytes) -> None:
        self.tried.set()
        if not self.has_room:
            raise StoreUnavailable("no room")
        self.kept.append(data)


async def test_an_image_of_a_lost_attempt_that_waits_for_room_is_not_stored_beside_the_next_ones() -> None:
    store, tasks, ends = Full(), Tasks(), Ends()
    made: Any = store
    stands: Any = ends
    recorder = AttemptRecorder(made, stands, tasks, NONE, StepTimes(), ())
    attempt = Attempt(scheduled().job, CARD)
    header = ImageHeader(0, "image/png", 3, 1, 1, "ab" * 32, 1)
    recorder.take(attempt, EncodedImage(header, b"old", 0.0))
    await store.tried.wait()
    attempt.is_over = True
    store.has_room = True
    await asyncio.wait_for(tasks.join(), 10)
    assert store.kept == []


class Source:
    """Gives devices when a test says so."""

    waits_for_more = True
    profiles = ()

    def __init__(self, *devices: Idle) -> None:
        self.devices = devices
        self.join: Any = None
        self.refused: list[str] = []

    async def open(self, join: Callable[[Device], None]) -> None:
        self.join = join
        for device in self.devices:
            self.join(device)

    def missing(self) -> str:
        return "none is there"

    def refuse(self, _: Device, error: DeviceError) -> None:
        self.refused.append(error.message)

    def close(self) -> None:
        pass


def fleet_of(source: Source, backlog: Backlog, tasks: Tasks) -> Fleet:
    def make(device: Any, on_lost: Any) -> Dispatcher:
        return dispatcher_of(device, backlog, on_lost)

    return Fleet(source, make, backlog, tasks, on_all_lost=lambda: None, on_available=lambda _: None)


PRELOADS = [Preload(name, NONE, "reference", ()) for name in ("one", "two")]


async def test_a_device_that_joins_while_others_load_has_all_models_before_it_runs_jobs() -> None:
    early, late = Idle(), Idle()
    source, tasks, backlog = Source(early), Tasks(), backlog_of(Ends())
    fleet = fleet_of(source, backlog, tasks)
    await fleet.open()

    async def join_the_other() -> None:
        early.loads = None
        source.join(late)

    early.loads = join_the_other
    for preload in PRELOADS:
        await fleet.preload(preload)
    fleet.start()
    await asyncio.wait_for(tasks.join(), 10)
    assert early.loaded == late.loaded == ["one", "two"]
    await fleet.stop()


async def test_a_device_that_is_lost_while_it_loads_stops_no_start_where_others_may_come() -> None:
    lost, other = Idle(), Idle()
    fleet = fleet_of(Source(lost, other), backlog_of(Ends()), Tasks())
    await fleet.open()

    async def fall() -> None:
        raise DeviceLost("it fell off the bus")

    lost.loads = fall
    await fleet.preload(PRELOADS[0])
    assert [one.lost_because for one in fleet.devices] == ["it fell off the bus", ""]


@pytest.mark.parametrize("error", [ChromaError("too little memory"), RuntimeError("secret")])
async def test_a_late_device_that_cannot_load_is_lost_and_its_source_is_told(error: Exception) -> None:
    source, tasks, late = Source(Idle()), Tasks(), Idle()
    fleet = fleet_of(source, backlog_of(Ends()), tasks)
    await fleet.open()
    await fleet.preload(PRELOADS[0])
    fleet.start()

    async def fail() -> None:
        raise error

    late.loads = fail
    source.join(late)
    await asyncio.wait_for(tasks.join(), 10)
    why = "too little memory" if isinstance(error, ChromaError) else "RuntimeError"
    assert source.refused == [f"it cannot load a model: {why}"]
    assert fleet.devices[1].lost_because == source.refused[0]
    await fleet.stop()


async def test_a_stop_does_not_wait_for_a_late_device_that_loads() -> None:
    source, tasks, late = Source(Idle()), Tasks(), Idle()
    fleet = fleet_of(source, backlog_of(Ends()), tasks)
    await fleet.open()
    await fleet.preload(PRELOADS[0])
    fleet.start()
    late.loads = asyncio.Event().wait
    source.join(late)
    await asyncio.sleep(0)
    await fleet.finish_running(10)
    await asyncio.wait_for(tasks.join(), 10)
    assert late.loaded == []
    await fleet.stop()
