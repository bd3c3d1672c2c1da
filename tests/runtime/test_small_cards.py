"""Several models on a card that has room for one, and what devices of several sizes serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chromarpc_server.domain.devices import DeviceDescription, DeviceState
from chromarpc_server.domain.errors import OutOfMemory
from chromarpc_server.domain.limits import Budgets
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline import CheckpointFiles, DeviceChoice, LoadContext
from chromarpc_server.runtime import model_cache
from chromarpc_server.runtime.device import DeviceStatus, withheld_because
from chromarpc_server.runtime.model_cache import CacheSnapshot, ModelCache

CPU = DeviceChoice(torch.device("cpu"), torch.float32)
FILES = CheckpointFiles(*[Path()] * 4)
WHOLE = MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=False)
STREAMED = replace(WHOLE, streamed_blocks=20)


class _Card:
    """Of which a model takes all; the second one beside it could only be streamed."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.has_room = True

    def load(self, *_: Any, memory: Any, **__: Any) -> Any:
        self.asked.append(memory.streaming)
        if not self.has_room or not memory.streaming:
            raise OutOfMemory("the device has too little")
        parts = SimpleNamespace(size_bytes=0)
        return SimpleNamespace(size_bytes=1, memory=STREAMED, trainer_parts=parts, revision="")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> _Card:
    card = _Card()
    monkeypatch.setattr(model_cache, "Checkpoint", card)
    return card


def test_a_model_leaves_where_the_next_one_would_have_to_stream_blocks_beside_it(card: _Card) -> None:
    published: list[CacheSnapshot] = []
    cache = ModelCache(CPU, Budgets(max_checkpoints=2), publish=published.append)
    for name in ("one", "other", "one"):
        cache.checkpoint(name, FILES, LoadContext())
        assert list(published[-1].resident_bytes) == [name]
        assert published[-1].memory[name].streamed_blocks == 20
    assert card.asked == [True, False, True, False, True]


def test_a_model_that_has_no_room_alone_is_refused(card: _Card) -> None:
    cache = ModelCache(CPU, Budgets(), publish=lambda _: None)
    card.has_room = False
    with pytest.raises(OutOfMemory):
        cache.checkpoint("one", FILES, LoadContext())
    assert card.asked == [True]


def _device(plan: MemoryPlan | None, state: DeviceState = DeviceState.IDLE) -> DeviceStatus:
    memory = {} if plan is None else {"chroma": plan}
    return DeviceStatus(
        DeviceDescription("cuda:0", "a GPU", 1, "bfloat16"), state, CacheSnapshot(memory=memory), 0
    )


def test_a_profile_is_withheld_only_where_no_device_serves_it() -> None:
    assert "20 of its blocks" in withheld_because("preview", "chroma", [_device(STREAMED)])
    assert not withheld_because("reference", "chroma", [_device(STREAMED)])
    assert not withheld_because("preview", "chroma", [_device(STREAMED), _device(WHOLE)])
    assert not withheld_because("preview", "chroma", [_device(STREAMED), _device(None)])
    assert not withheld_because("preview", "chroma", [])
    lost = _device(WHOLE, DeviceState.LOST)
    assert withheld_because("preview", "chroma", [_device(STREAMED), lost])
