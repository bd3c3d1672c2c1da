"""Devices of several kinds, that are lost and that come later: where jobs go, and what their callers are told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import chromarpc
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import DeviceError, DeviceLost
from chromarpc_server.pipeline import PROFILES, DeviceChoice
from chromarpc_server.runtime.device import Device
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Emit, Work, WorkDone
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2, "seed": 1}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}


class Card(DeviceThread):
    """A CPU that says it is something else, and can be lost."""

    def __init__(self, card_id: str, model: str, profiles: Sequence[str] = tuple(PROFILES)) -> None:
        super().__init__(DeviceChoice(torch.device("cpu"), torch.float32, card_id), RunningTime())
        self._described = DeviceDescription(card_id, model, 1, "float32", tuple(profiles))
        self.loaded: list[str] = []
        self.ran: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._losing: asyncio.Future[DeviceError] | None = None

    @property
    def description(self) -> DeviceDescription:
        return self._described

    async def open(self) -> DeviceDescription:
        await super().open()
        self._loop = asyncio.get_running_loop()
        self._losing = self._loop.create_future()
        return self._described

    async def load(self, model_id: str, *arguments: Any) -> None:
        assert not self.ran
        await super().load(model_id, *arguments)
        self.loaded.append(model_id)

    async def run(self, work: Work, emit: Emit) -> WorkDone:
        assert self._losing is not None
        self.ran.append(work.id)
        running = asyncio.ensure_future(super().run(work, emit))
        await asyncio.wait({running, self._losing}, return_when=asyncio.FIRST_COMPLETED)
        if self._losing.done():
            raise self._losing.result()
        return running.result()

    async def lost(self) -> DeviceError:
        assert self._losing is not None
        return await asyncio.shield(self._losing)

    def lose(self) -> None:
        """From any thread."""
        assert self._loop is not None
        assert self._losing is not None
        self._loop.call_soon_threadsafe(self._losing.set_result, DeviceLost("it fell off the bus"))


@dataclass
class Cards:
    """A source of them."""

    cards: list[Card]
    waits_for_more: bool = False
    profiles: tuple[str, ...] = tuple(PROFILES)
    refused: list[tuple[str, str]] = field(default_factory=list)
    _join: Callable[[Device], None] | None = None
    _loop: asyncio.AbstractEventLoop | None = field(default=None)

    async def open(self, join: Callable[[Device], None]) -> None:
        self._join, self._loop = join, asyncio.get_running_loop()
        for card in self.cards:
            await card.open()
            join(card)

    def add(self, card: Card) -> None:
        """From any thread."""
        assert self._loop is not None
        assert self._join is not None
        asyncio.run_coroutine_threadsafe(card.open(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._join, card)

    def missing(self) -> str:
        return "all cards are gone"

    def refuse(self, device: Device, error: DeviceError) -> None:
        self.refused.append((device.description.id, error.message))

    def close(self) -> None:
        pass


@pytest.fixture
def serve_with(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunningServer]:
    def start(cards: Cards, **settings: Any) -> RunningServer:
        monkeypatch.setattr("chromarpc_server.app.device_source", lambda *_: cards)
        return serve(**settings)

    return start


def _until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def _until_step(events: Any) -> str:
    """Reads a stream to its first step. Returns the job's id."""
    job_id = ""
    for event in events:
        if isinstance(event, chromarpc.Accepted):
            job_id = event.job_id
        if isinstance(event, chromarpc.Step):
            return job_id
    raise AssertionError("the stream ended before a step")


def _restarts(events: Sequence[Any]) -> list[tuple[str, bool]]:
    return [
        (event.moved_from, event.bits_may_differ) for event in events if isinstance(event, chromarpc.Restarted)
    ]


def _collected(events: Any) -> tuple[list[Any], threading.Thread]:
    """Reads a stream beside the test, to its end or until its job is cancelled."""
    seen: list[Any] = []

    def read() -> None:
        with contextlib.suppress(chromarpc.Cancelled):
            seen.extend(events)

    reading = threading.Thread(target=read)
    reading.start()
    return seen, reading


def test_a_job_waits_for_a_device_of_the_same_model(serve_with: Callable[..., RunningServer]) -> None:
    first, same, other = Card("a", "A"), Card("b", "A"), Card("c", "B")
    server = serve_with(Cards([first, same, other]))
    with chromarpc.Client(server.target) as client:
        streams = [client.generate("a", **LONG) for _ in range(3)]
        by_job = {_until_step(events): events for events in streams}
        moving, busy, elsewhere = (by_job[card.ran[0]] for card in (first, same, other))
        seen, reading = _collected(moving)
        first.lose()
        _until(lambda: _restarts(seen))
        elsewhere.close()  # the other model's is free now, and is not taken
        assert client.generate_images("b", **SMALL)
        busy.close()
        _until(lambda: len(same.ran) > 1)
        assert same.ran[1] == first.ran[0]
        assert first.ran[0] not in other.ran
        assert _restarts(seen) == [("a", False)]
        client.cancel_job(first.ran[0])
        reading.join(30)


def test_where_only_another_model_is_left_the_events_say_that_bits_may_differ(
    serve_with: Callable[..., RunningServer],
) -> None:
    first, other = Card("a", "A"), Card("c", "B")
    server = serve_with(Cards([first, other]))
    with chromarpc.Client(server.target) as client:
        events = client.generate("a", **{**LONG, "sample_steps": 40})
        _until_step(events)
        losing, left = (first, other) if first.ran else (other, first)
        losing.lose()
        rest = list(events)
        assert _restarts(rest) == [(losing.description.id, True)]
        assert isinstance(rest[-1], chromarpc.Completed)
        assert left.ran == losing.ran


def test_a_waiting_job_goes_to_another_model_once_its_own_is_gone(
    serve_with: Callable[..., RunningServer],
) -> None:
    first, same = Card("a", "A"), Card("b", "A")
    cards = Cards([first, same])
    server = serve_with(cards)
    with chromarpc.Client(server.target) as client:
        one, two = client.generate("a", **LONG), client.generate("b", **{**LONG, "sample_steps": 40})
        _until_step(one)
        two_id = _until_step(two)
        at_two = first if two_id in first.ran else same
        seen, reading = _collected(two)
        at_two.lose()
        _until(lambda: _restarts(seen))
        other = Card("c", "B")
        cards.add(other)
        ({first, same} - {at_two}).pop().lose()
        one.close()
        reading.join(30)
        assert _restarts(seen)[0] == (at_two.description.id, False)
        assert _restarts(seen)[1][1]
        assert isinstance(seen[-1], chromarpc.Completed)
        assert two_id in other.ran


def test_a_job_that_no_device_is_left_for_ends_with_the_reason(serve_with: Callable[..., RunningServer]) -> None:
    able, other = Card("a", "A"), Card("b", "B", ["reference"])
    server = serve_with(Cards([able, other]))
    with chromarpc.Client(server.target) as client:
        running = client.generate("a", profile="exact", **LONG)
        running_id = _until_step(running)
        waiting = client.create_job("b", profile="exact", **SMALL).job_id
        able.lose()
        for events in (running, client.watch_job(waiting)):
            with pytest.raises(chromarpc.DeviceLost, match="profile exact"):
                list(events)
        assert client.generate_images("a", **SMALL)
        assert not {running_id, waiting} & set(other.ran)


def test_a_server_whose_devices_may_come_back_keeps_its_jobs_and_goes_on(
    serve_with: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture
) -> None:
    card = Card("a", "A")
    cards = Cards([card], waits_for_more=True)
    server = serve_with(cards, preload=["chroma-mini"], warm_up=["64x64"])
    with chromarpc.Client(server.target) as client:
        assert card.loaded == ["chroma-mini"]
        running = client.generate("a", **{**LONG, "sample_steps": 30})
        _until_step(running)
        card.lose()
        _until(lambda: client.health() is chromarpc.HealthStatus.NOT_SERVING)
        assert any("all cards are gone" in str(getattr(record, "reason", "")) for record in caplog.records)
        fresh = Card("b", "A")
        cards.add(fresh)
        rest = list(running)
        assert isinstance(rest[-1], chromarpc.Completed)
        assert fresh.loaded == ["chroma-mini"]  # before it ran anything
        assert client.health() is chromarpc.HealthStatus.SERVING


def test_a_device_that_is_lost_while_it_preloads_stops_no_start_where_more_may_come(
    serve_with: Callable[..., RunningServer],
) -> None:
    class Failing(Card):
        async def load(self, *_: Any) -> None:
            raise DeviceLost("it has other weights")

    cards = Cards([Failing("a", "A"), Card("b", "A")], waits_for_more=True)
    server = serve_with(cards, preload=["chroma-mini"], warm_up=["64x64"])
    with chromarpc.Client(server.target) as client:
        assert client.health() is chromarpc.HealthStatus.SERVING
        assert [device.lost_because for device in client.server_info().devices] == ["it has other weights", ""]


def test_a_device_that_joins_while_others_preload_does_so_too(serve_with: Callable[..., RunningServer]) -> None:
    late, cards = Card("b", "A"), Cards([], waits_for_more=True)

    class First(Card):
        async def load(self, *what: Any) -> None:
            await late.open()
            assert cards._join is not None
            cards._join(late)
            await super().load(*what)

    cards.cards.append(First("a", "A"))
    serve_with(cards, preload=["chroma-mini"], warm_up=["64x64"])
    _until(lambda: late.loaded == ["chroma-mini"])


def test_an_idle_device_that_is_lost_is_given_no_job(serve_with: Callable[..., RunningServer]) -> None:
    first, second = Card("a", "A"), Card("b", "A")
    server = serve_with(Cards([first, second]))
    with chromarpc.Client(server.target) as client:
        first.lose()
        _until(lambda: any(device.lost_because for device in client.server_info().devices))
        for _ in range(2):
            assert client.generate_images("a", **SMALL)
        assert (len(first.ran), len(second.ran)) == (0, 2)
