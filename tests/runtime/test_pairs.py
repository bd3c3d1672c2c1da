"""What is done with a device is done with both cards of a pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import DeviceLost, OutOfMemory
from chromarpc_server.domain.limits import DeviceTimeouts
from chromarpc_server.pipeline import DeviceChoice
from chromarpc_server.runtime import device_thread, worker
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.watchdog import Watchdog
from chromarpc_server.runtime.worker import DeviceWorker

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
PAIR = DeviceChoice(FIRST, torch.bfloat16, id="cuda:0+cuda:1", second=SECOND)


class _Cache:
    def __init__(self) -> None:
        self.cleared = 0

    def clear(self, *, host: bool) -> None:
        self.cleared += 1


def _worker(cache: Any) -> DeviceWorker:
    description = DeviceDescription(PAIR.id, "a GPU", 1, "bfloat16", second="cuda:1")
    return DeviceWorker(PAIR, description, cache, Watchdog(DeviceTimeouts(), RunningTime()))


@pytest.mark.parametrize("gone", [FIRST, SECOND])
def test_a_pair_is_lost_with_either_of_its_cards(gone: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(card: torch.device) -> bool:
        if card == gone:
            raise DeviceLost("the device failed and cannot be used any more")
        return False

    monkeypatch.setattr(worker, "probe_device", probe)
    assert isinstance(_worker(_Cache())._classified(RuntimeError("CUDA error"), {}), DeviceLost)


@pytest.mark.parametrize("full", [FIRST, SECOND])
def test_a_pair_of_which_either_card_is_full_lacks_memory(
    full: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[torch.device] = []

    def probe(card: torch.device) -> bool:
        probed.append(card)
        return card == full

    monkeypatch.setattr(worker, "probe_device", probe)
    cache = _Cache()
    assert isinstance(_worker(cache)._classified(RuntimeError("unknown words"), {}), OutOfMemory)
    assert (probed, cache.cleared) == ([FIRST, SECOND], 1)


def test_a_pair_uses_as_much_memory_as_its_fuller_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_thread, "used_memory_bytes", {FIRST: 30, SECOND: 20}.__getitem__)
    device = DeviceThread(PAIR, RunningTime())
    assert device.memory_used_bytes() == 30
    device.close()
