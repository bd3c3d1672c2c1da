"""A paused process: its time does not count, neither against the device nor against callers that are away."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from concurrent.futures import Future

import pytest

from chromarpc_server.domain.errors import DeviceHung
from chromarpc_server.domain.limits import DeviceTimeouts
from chromarpc_server.runtime import watchdog as watchdog_module
from chromarpc_server.runtime.running_time import MAX_PAUSES, RunningTime
from chromarpc_server.runtime.watchdog import Watchdog


class Clock:
    """The monotonic clock, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class StandingClock:
    """Moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_look_that_comes_late_is_a_pause_and_the_rest_of_the_time_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = StandingClock()
    running = RunningTime(clock=clock)
    began = clock.now
    for _ in range(5):
        clock.now += 1.9  # the event loop is busy
        running.look()
    assert running.since(began) == pytest.approx(9.5)
    clock.now += 100
    running.look()
    after = clock.now
    assert running.since(began) == pytest.approx(9.5)
    clock.now += 3
    assert running.since(began) == pytest.approx(12.5)
    # What begins after a pause, or in it, is given nothing of it, whenever the pause is noticed.
    assert running.since(after) == pytest.approx(3)
    assert running.since(after - 40) == pytest.approx(3)
    (line,) = [record for record in caplog.records if record.getMessage() == "process.paused"]
    assert line.__dict__["seconds"] == 100
    assert line.levelno == logging.WARNING


def test_many_pauses_take_no_more_room() -> None:
    clock = StandingClock()
    running = RunningTime(clock=clock)
    for _ in range(MAX_PAUSES * 2):
        clock.now += 11
        running.look()
    assert running.since(clock.now - 11 * MAX_PAUSES) == pytest.approx(0)
    assert running.since(clock.now - 11 * MAX_PAUSES - 4) == pytest.approx(4)
    assert len(running._pauses) == MAX_PAUSES


async def test_a_timer_that_came_due_in_a_pause_waits_for_what_was_left() -> None:
    clock = Clock()
    running = RunningTime(clock=clock)
    running.start()
    called = asyncio.Event()
    loop = asyncio.get_running_loop()
    due_at = loop.time() + 0.2
    timer = running.call_later(0.2, called.set)
    clock.ahead_s = 3600.0  # as if SIGCONT came an hour later
    running.look()
    await asyncio.wait_for(called.wait(), 10)
    assert loop.time() >= due_at
    timer.cancel()
    running.close()


async def test_timers_fire_after_a_pause_only_once_the_process_has_run_for_so_long() -> None:
    clock = StandingClock()
    running = RunningTime(clock=clock)
    called = asyncio.Event()
    running.call_later(0.01, called.set)
    clock.now += 3600  # nobody has looked yet: the timer itself does
    looks = []
    for _ in range(3):
        await asyncio.sleep(0.02)
        looks.append(called.is_set())
    assert looks == [False] * 3
    clock.now += 1.02
    await asyncio.wait_for(called.wait(), 10)


async def test_a_timer_that_is_cancelled_calls_nothing() -> None:
    running = RunningTime()
    called = asyncio.Event()
    running.call_later(0, called.set).cancel()
    await asyncio.sleep(0.01)
    assert not called.is_set()


async def guarded(watchdog: Watchdog, work: Future[str]) -> str:
    return await watchdog.guard(asyncio.wrap_future(work))


async def test_a_pause_is_no_hung_device_and_a_hung_one_is_found_after_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog_module, "LOOK_EVERY_S", 0.01)
    clock = Clock()
    running = RunningTime(clock=clock)
    watchdog = Watchdog(DeviceTimeouts(step_s=5.0), running, device_id="cuda:1")
    work: Future[str] = Future()
    watchdog.step()
    guard = asyncio.create_task(guarded(watchdog, work))
    await asyncio.sleep(0.05)
    clock.ahead_s += 3600
    await asyncio.sleep(0.1)
    assert "process.paused" in caplog.text
    assert not guard.done()
    # Ten seconds more in which the event loop runs.
    for _ in range(10):
        clock.ahead_s += 1
        await asyncio.sleep(0.02)
    with pytest.raises(DeviceHung, match="a denoising step takes too long"):
        await asyncio.wait_for(guard, 10)
    (hung,) = (record for record in caplog.records if record.getMessage() == "device.hung")
    assert vars(hung)["device"] == "cuda:1"


async def test_work_that_a_pause_came_between_ends_as_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "LOOK_EVERY_S", 0.01)
    clock = Clock()
    watchdog = Watchdog(DeviceTimeouts(other_s=5.0), RunningTime(clock=clock))
    work: Future[str] = Future()
    watchdog.other("reading weights")
    guard = asyncio.create_task(guarded(watchdog, work))
    await asyncio.sleep(0.05)
    clock.ahead_s += 3600
    await asyncio.sleep(0.05)
    work.set_result("done")
    assert await asyncio.wait_for(guard, 10) == "done"


async def test_work_whose_caller_was_cancelled_may_fail_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(DeviceTimeouts(), RunningTime())
    work: Future[str] = Future()
    guard = asyncio.create_task(guarded(watchdog, work))
    await asyncio.sleep(0)
    guard.cancel()
    with pytest.raises(asyncio.CancelledError):
        await guard
    work.set_exception(DeviceHung("too late"))
    await asyncio.sleep(0.01)
    del guard, work
    gc.collect()
    assert caplog.text == ""


async def test_what_was_before_the_first_look_is_no_pause(caplog: pytest.LogCaptureFixture) -> None:
    clock = StandingClock()
    running = RunningTime(clock=clock)
    clock.now += 20  # a device is opened
    running.start()
    running.close()
    assert not caplog.records
