"""Everything happens on the device that was chosen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.pipeline import DeviceChoice
from chromarpc_server.pipeline.weights import staging
from chromarpc_server.runtime import device_thread
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.running_time import RunningTime

SECOND = torch.device("cuda", 1)


async def test_the_devices_thread_selects_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: selected.append((threading.current_thread().name, device))
    )
    description = DeviceDescription("cuda:1", "a GPU", 1, "bfloat16")
    monkeypatch.setattr(device_thread, "describe_device", lambda _: description)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: None)
    device = DeviceThread(DeviceChoice(SECOND, torch.bfloat16), RunningTime())
    try:
        assert await device.open() == description
    finally:
        device.close()
    assert selected == [("device_0", SECOND)]


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class Event:
    """Notes where it was recorded."""

    recorded: list[Any]

    def synchronize(self) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        self.recorded.append(stream and stream.device)


def _unpinned(empty: Any) -> Any:
    def allocate(*size: Any, pin_memory: bool, **rest: Any) -> torch.Tensor:
        assert pin_memory
        allocated: torch.Tensor = empty(*size, **rest)
        return allocated

    return allocate


def test_a_copy_to_a_device_is_waited_for_on_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is recorded on another device's stream is done at once: the piece would be overwritten."""
    monkeypatch.setattr(staging.torch, "empty", _unpinned(torch.empty))
    monkeypatch.setattr(staging, "PIECE_BYTES", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(Event, "recorded", [], raising=False)
    stage = staging._Stage.make(SECOND)
    for _ in range(3):
        stage.free_piece()
        stage.note_copy()
    assert Event.recorded == [SECOND] * 3


def test_a_recording_that_fails_leaves_the_stream_that_was_current(monkeypatch: pytest.MonkeyPatch) -> None:
    from chromarpc_server.pipeline.recording import recording

    current: list[str] = ["before"]
    given: dict[str, Any] = {}

    @contextmanager
    def graph(_: Any, *, stream: Any, **rest: Any) -> Iterator[None]:
        given.update(rest, stream=stream)
        current.append("recording")
        yield
        raise AssertionError("the end is not reached where the work fails")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(given.update(device=device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ZeroDivisionError), recording(object(), SECOND):  # type: ignore[arg-type]
        assert 1 // 0
    assert current == ["before", "recording", "before"]
    assert given["device"] == SECOND
    assert given["stream"].device == SECOND
