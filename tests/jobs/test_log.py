"""The event log: numbered, followed from anywhere, bounded for slow readers."""

from __future__ import annotations

import asyncio
import time

import pytest

from chromarpc_server.domain.errors import Draining, JobCancelled
from chromarpc_server.domain.events import Cancelled, ImageChunk, Loading, LoadingStage, Preview, Step
from chromarpc_server.jobs.log import KEPT_UNREAD, JobLog


def _step(number: int, *, first: bool = False) -> Step:
    return Step(0, number, 150, 1.0, 1000.0, 0.1, None, (1.0, 0.0) if first else ())


def _end() -> Cancelled:
    return Cancelled(JobCancelled("enough"))


async def _sequences(log: JobLog, after: int = 0) -> list[int]:
    return [entry.sequence async for entry in log.follow(after) if entry is not None]


async def test_a_reader_gets_everything_in_order_and_stops_at_the_end() -> None:
    log = JobLog()
    reading = asyncio.create_task(_sequences(log))
    for number in range(1, 4):
        log.append(_step(number))
        await asyncio.sleep(0)
    log.append(_end())
    log.append(_step(9))
    assert await reading == [1, 2, 3, 4]
    assert log.closed


async def test_a_second_reader_starts_where_it_likes() -> None:
    log = JobLog()
    for number in range(1, 4):
        log.append(_step(number))
    log.append(_end())
    assert await _sequences(log, after=2) == [3, 4]


@pytest.mark.slow
async def test_a_slow_reader_misses_progress_but_no_facts_and_no_bytes() -> None:
    log = JobLog()
    log.append(_step(1, first=True))
    for number in range(2, 2000):
        log.append(_step(number))
        log.append(Preview(0, number, "image/png", 1, 1, b"x"))
        log.append(Loading(LoadingStage.READING, number, 2000))
    for offset in range(50):
        log.append(ImageChunk(0, offset, b"x"))
    log.append(_end())
    events = [entry.event async for entry in log.follow() if entry is not None]
    assert sum(isinstance(event, ImageChunk) for event in events) == 50
    assert sum(isinstance(event, Preview) for event in events) == KEPT_UNREAD[Preview]
    assert sum(isinstance(event, Step) for event in events) == KEPT_UNREAD[Step] + 1
    assert isinstance(events[0], Step)
    assert isinstance(events[-1], Cancelled)


async def test_a_quiet_log_gives_signs_of_life() -> None:
    log = JobLog()
    stream = log.follow(idle_s=0.01)
    assert await anext(stream) is None
    log.append(_end())
    assert await anext(stream) is not None


async def test_what_happens_in_the_moment_a_reader_gives_up_waiting_is_read() -> None:
    log = JobLog()
    reading = asyncio.ensure_future(anext(log.follow(idle_s=0.02)))
    await asyncio.sleep(0)  # it waits now
    asyncio.get_running_loop().call_later(0.03, log.append, _step(1))
    time.sleep(0.05)  # both timers are due at once: the reader's, and then the event's  # noqa: ASYNC251
    entry = await reading
    assert entry is not None
    assert entry.sequence == 1


async def test_an_end_is_decided_before_it_is_seen() -> None:
    log = JobLog()
    for offset in range(3):
        log.append(ImageChunk(0, offset, b"x" * 1000))
    assert log.seal(_end()).sequence == 4
    log.append(_step(9))
    assert (log.sealed, log.closed, log.ending) == (True, False, None)
    reading = asyncio.create_task(_sequences(log))
    await asyncio.sleep(0)
    assert not reading.done()
    assert log.entries[-1].sequence == 4
    log.close()
    assert log.ending is not None
    for _ in range(2):
        assert await _sequences(log) == [1, 2, 3, 4]
    assert await reading == [1, 2, 3, 4]


async def test_readers_of_a_suspended_log_get_everything_and_are_told() -> None:
    log = JobLog()
    log.append(_step(1))
    reading = asyncio.create_task(_sequences(log))
    await asyncio.sleep(0)
    log.suspend(Draining("stopping"))
    with pytest.raises(Draining):
        await reading


async def test_numbers_go_on_elsewhere_after_a_restart() -> None:
    log = JobLog()
    log.append(_step(1))
    log.skip_to(1000)
    log.append(_end())
    assert await _sequences(log) == [1, 1001]


async def test_a_reader_that_waits_again_and_again_is_told_of_quiet_only_after_the_last_event() -> None:
    log, loop, idle_s = JobLog(), asyncio.get_running_loop(), 0.05
    stream = log.follow(idle_s=idle_s)
    last_s = 0.0
    for number in range(1, 5):
        loop.call_later(idle_s / 5, log.append, _step(number))
        entry = await anext(stream)
        while entry is None:  # a slow machine
            entry = await anext(stream)
        assert entry.sequence == number
        last_s = loop.time()
    assert await anext(stream) is None
    assert loop.time() - last_s >= idle_s * 0.99
    assert await anext(stream) is None
    log.append(_end())
    last = await anext(stream)
    assert last is not None
    assert last.sequence == 5
