"""Who leaves first where memory is short, and what the preview profiles hold counts with the rest."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chromarpc_server.domain.errors import JobCancelled
from chromarpc_server.domain.limits import Budgets
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    SILENT,
    Adapter,
    CheckpointFiles,
    DeviceChoice,
    LoadContext,
    LoadProgress,
    read_adapter,
)
from chromarpc_server.runtime import device_room
from chromarpc_server.runtime.device_room import FREE_BYTES, DeviceRoom
from chromarpc_server.runtime.model_cache import CacheSnapshot, ModelCache, SetKey
from tests.pipeline.adapters.conftest import values

pytestmark = pytest.mark.slow

CPU = DeviceChoice(torch.device("cpu"), torch.float32)
FLOAT8 = TrainerSettings()
INT8 = TrainerSettings(qtype="qint8")
INT2 = TrainerSettings(qtype="qint2")


@dataclass
class _Parts:
    """Text encoders by their quantizer, least recently used first."""

    encoders: dict[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(self.encoders.values())

    def idle_bytes(self, needed: list[TrainerSettings]) -> int:
        return sum(size for name, size in self.encoders.items() if name not in {one.qtype for one in needed})

    def drop_idle(self, needed: list[TrainerSettings]) -> bool:
        idle = [name for name in self.encoders if name not in {one.qtype for one in needed}]
        if idle:
            del self.encoders[idle[0]]
        return bool(idle)


class _Device:
    """A checkpoint with text encoders of 10 bytes and transformers of 100."""

    def __init__(self, budget: int | None, *settings: TrainerSettings | None, device: Any = CPU) -> None:
        self.parts = _Parts()
        self.checkpoint: Any = SimpleNamespace(trainer_parts=self.parts)
        self.slots: list[Any] = [
            SimpleNamespace(
                checkpoint=self.checkpoint, transformer=SimpleNamespace(size_bytes=100, text_settings=one)
            )
            for one in settings
        ]
        self.room: DeviceRoom[Any] = DeviceRoom(
            device, Budgets(prepared_bytes=budget), OrderedDict(mini=self.checkpoint), self.slots
        )

    def with_encoders(self, *settings: TrainerSettings) -> _Device:
        self.parts.encoders = {one.qtype: 10 for one in settings}
        return self

    def make(self, needed: int, trainer: TrainerSettings | None) -> int:
        return self.room.make(needed, self.checkpoint, trainer, keep=object())

    @property
    def left(self) -> list[str | None]:
        return [slot.transformer.text_settings and slot.transformer.text_settings.qtype for slot in self.slots]


def test_a_text_encoder_that_no_resident_set_takes_leaves_first_and_the_oldest_of_them_before_others() -> None:
    device = _Device(220, FLOAT8).with_encoders(INT2, FLOAT8, INT8)
    assert device.make(91, FLOAT8) == 0
    assert list(device.parts.encoders) == ["qfloat8", "qint8"]
    assert device.make(101, FLOAT8) == 0
    assert list(device.parts.encoders) == ["qfloat8"]
    assert device.left == ["qfloat8"]


def test_the_text_encoder_of_the_job_at_hand_stays() -> None:
    device = _Device(119, FLOAT8).with_encoders(INT8, FLOAT8)
    assert device.make(100, INT8) == 1
    assert device.left == []
    assert list(device.parts.encoders) == ["qint8"]


def test_sets_leave_in_the_order_of_use_and_their_text_encoders_after_them() -> None:
    device = _Device(320, FLOAT8, None, INT8).with_encoders(FLOAT8, INT8)
    assert device.make(90, INT8) == 1
    assert device.left == [None, "qint8"]
    assert list(device.parts.encoders) == ["qfloat8", "qint8"], "there is room enough for it now"
    assert device.make(101, INT8) == 0
    assert list(device.parts.encoders) == ["qint8"]


def test_no_text_encoder_is_dropped_in_vain() -> None:
    device = _Device(200, FLOAT8).with_encoders(INT8, FLOAT8)
    assert not device.room.fits_without_idle(100, device.checkpoint, FLOAT8)
    assert list(device.parts.encoders) == ["qint8", "qfloat8"]


def test_where_nothing_fits_one_text_encoder_is_kept() -> None:
    device = _Device(1, FLOAT8, INT8).with_encoders(FLOAT8, INT8)
    assert device.make(100, INT2) == 2
    assert device.parts.encoders == {}
    device.with_encoders(FLOAT8, INT2)
    assert device.make(100, INT2) == 0
    assert list(device.parts.encoders) == ["qint2"]


@pytest.mark.parametrize(("free", "evicted"), [(FREE_BYTES + 100, 0), (FREE_BYTES + 99, 1)])
def test_a_gpu_without_a_budget_is_asked_what_is_free(
    free: int, evicted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_room, "usable_memory_bytes", lambda *_: free)
    monkeypatch.setattr(device_room, "release_memory", lambda _: None)
    device = _Device(None, FLOAT8, device=DeviceChoice(torch.device("cuda"), torch.bfloat16))
    assert device.make(100, FLOAT8) == evicted


@pytest.mark.parametrize(("first", "second", "evicted"), [(100, 100, 0), (99, 100, 1), (100, 99, 1)])
def test_of_a_pair_the_fuller_gpu_decides(
    first: int, second: int, evicted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = torch.device("cuda", 0), torch.device("cuda", 1)
    free = {cards[0]: FREE_BYTES + first, cards[1]: FREE_BYTES + second}
    released: list[torch.device] = []
    monkeypatch.setattr(device_room, "usable_memory_bytes", lambda card, _: free[card])
    monkeypatch.setattr(device_room, "release_memory", released.append)
    device = _Device(None, FLOAT8, device=DeviceChoice(cards[0], torch.bfloat16, second=cards[1]))
    assert device.make(100, FLOAT8) == evicted
    assert released == list(cards) * evicted


# The cache with a real checkpoint.


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def files(tiny_checkpoint: Path) -> CheckpointFiles:
    return CheckpointFiles(
        transformer=tiny_checkpoint / "chroma-mini.safetensors",
        text_encoder=tiny_checkpoint / "text_encoder_2",
        tokenizer=tiny_checkpoint / "tokenizer_2",
        vae=tiny_checkpoint / "vae",
    )


class _Cache:
    """A model cache with one model, and what it told."""

    def __init__(self, files: CheckpointFiles, prepared_bytes: int | None) -> None:
        self.told: list[CacheSnapshot] = []
        self.progress: list[LoadProgress] = []
        self.cache = ModelCache(CPU, Budgets(prepared_bytes=prepared_bytes), publish=self.told.append)
        self.checkpoint = self.cache.checkpoint("mini", files, SILENT)

    def use(
        self,
        settings: TrainerSettings | None,
        *adapters: tuple[Adapter, float],
        profile: str = "preview",
    ) -> str:
        """Has a set in place, and says where it came from."""
        self.progress.clear()
        key = SetKey("mini", profile, tuple((adapter.sha256, m) for adapter, m in adapters), settings)  # type: ignore[misc]
        _, report = self.cache.pipeline(self.checkpoint, adapters, key, LoadContext(progress=self.progress.append))
        return report.source.value

    @property
    def snapshot(self) -> CacheSnapshot:
        return self.told[-1]

    def bare_bytes(self, settings: TrainerSettings, profile: str = "preview") -> int:
        return self.checkpoint.prepared_bytes(PROFILES[profile], settings)


@pytest.fixture
def cache(files: CheckpointFiles) -> Callable[[int | None], _Cache]:
    return lambda prepared_bytes: _Cache(files, prepared_bytes)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[_Cache, int, int], Adapter]:
    def made(cache: _Cache, rank: int, seed: int) -> Adapter:
        tensors = {}
        for name, shape in cache.checkpoint.targets.items():
            if name.endswith(("qkv.weight", "linear1.weight")):
                module = f"diffusion_model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = values(rank, shape[1], seed=seed)
                tensors[f"{module}.lora_B.weight"] = values(shape[0], rank, seed=seed + 1)
        path = tmp_path / f"{rank}_{seed}.safetensors"
        save_file(tensors, path)
        return read_adapter(path, cache.checkpoint.targets)

    return made


def test_several_text_encoders_stay_where_they_fit_and_one_where_they_do_not(
    cache: Callable[[int | None], _Cache],
) -> None:
    roomy, short = cache(None), cache(1)
    for one in (roomy, short):
        for settings in (FLOAT8, INT8):
            one.use(settings)
            stages = {progress.stage for progress in one.progress}
            assert stages == {"reading", "quantizing"}, "of the text encoder, and of weights"
            assert one.progress[-1].done_bytes == one.progress[-1].total_bytes
    assert roomy.checkpoint.trainer_parts.encoder_count == 2
    assert short.checkpoint.trainer_parts.encoder_count == 1
    assert roomy.use(FLOAT8) == "resident"
    assert roomy.progress == [], "nothing had to be made"
    assert short.use(FLOAT8) == "built"
    assert "reading" in {progress.stage for progress in short.progress}


def test_a_quantizer_of_the_text_encoder_that_sets_share_has_one_text_encoder(
    cache: Callable[[int | None], _Cache],
) -> None:
    one = cache(None)
    one.use(FLOAT8)
    one.use(TrainerSettings(quantize=False, quantize_te=True, qtype="float8"))
    before = one.checkpoint.trainer_parts.encoder_count
    one.use(FLOAT8, profile="preview-exact")
    assert one.checkpoint.trainer_parts.encoder_count == before == 2


def test_what_the_preview_profiles_hold_is_told_with_the_models_bytes(
    cache: Callable[[int | None], _Cache], adapter: Callable[[_Cache, int, int], Adapter]
) -> None:
    one = cache(None)
    bare = one.snapshot.resident_bytes["mini"]
    assert one.snapshot.trainer_parts_bytes == {"mini": 0}
    one.use(FLOAT8)
    parts = one.snapshot.trainer_parts_bytes["mini"]
    assert parts > 0
    (without,) = one.snapshot.sets
    assert one.snapshot.resident_bytes["mini"] == bare + parts + without.size_bytes
    one.use(FLOAT8, (adapter(one, 16, 1), 1.0))
    _, beside = one.snapshot.sets
    assert beside.size_bytes > without.size_bytes
    assert one.snapshot.resident_bytes["mini"] == bare + parts + without.size_bytes + beside.size_bytes


@pytest.mark.parametrize("profile", ["preview", "preview-exact"])
@pytest.mark.parametrize("settings", [FLOAT8, INT8, TrainerSettings(dtype="float32")], ids=str)
def test_a_set_takes_what_was_foreseen(
    settings: TrainerSettings,
    profile: str,
    cache: Callable[[int | None], _Cache],
    adapter: Callable[[_Cache, int, int], Adapter],
) -> None:
    for adapters in ((), (16,), (16, 70)):
        one = cache(None)
        chosen = tuple((adapter(one, rank, rank), 0.5) for rank in adapters)
        foreseen = one.checkpoint.prepared_bytes(PROFILES[profile], settings, chosen)
        missing = one.checkpoint.missing_bytes(PROFILES[profile], settings)
        one.use(settings, *chosen, profile=profile)
        (held,) = one.snapshot.sets
        assert held.size_bytes == pytest.approx(foreseen, rel=0.02)
        assert one.snapshot.trainer_parts_bytes["mini"] == pytest.approx(missing, rel=0.02)
        assert one.checkpoint.missing_bytes(PROFILES[profile], settings) == 0


def test_how_many_sets_fit_depends_on_what_lies_beside_their_weights(
    cache: Callable[[int | None], _Cache], adapter: Callable[[_Cache, int, int], Adapter]
) -> None:
    measured = cache(None)
    measured.use(FLOAT8)
    parts, bare = measured.snapshot.trainer_parts_bytes["mini"], measured.snapshot.sets[0].size_bytes
    small, large = (adapter(measured, rank, rank) for rank in (16, 500))
    with_small, with_large = (
        measured.checkpoint.prepared_bytes(PROFILES["preview"], FLOAT8, [(one, 1.0)]) for one in (small, large)
    )
    assert with_large > 1.5 * with_small > 1.5 * bare
    budget = parts + bare + with_small + (with_large - with_small) // 2

    fits = cache(budget)
    assert [fits.use(FLOAT8), fits.use(FLOAT8, (small, 1.0))] == ["built", "built"]
    assert fits.use(FLOAT8) == "resident"
    too_large = cache(budget)
    assert [too_large.use(FLOAT8), too_large.use(FLOAT8, (large, 1.0))] == ["built", "switched"]
    assert len(too_large.snapshot.sets) == 1


def test_a_set_that_grows_in_place_makes_others_leave(
    cache: Callable[[int | None], _Cache], adapter: Callable[[_Cache, int, int], Adapter]
) -> None:
    measured = cache(None)
    small, other, large = (adapter(measured, rank, rank) for rank in (16, 20, 500))
    measured.use(FLOAT8)
    parts = measured.snapshot.trainer_parts_bytes["mini"]
    foreseen = measured.checkpoint.prepared_bytes(PROFILES["preview"], FLOAT8, [(small, 1.0)])
    one = cache(parts + 2 * foreseen + foreseen // 4)
    assert [one.use(FLOAT8, (small, 1.0)), one.use(FLOAT8, (other, 1.0))] == ["built", "built"]
    assert one.use(FLOAT8, (small, 0.5)) == "switched", "in the room that there is"
    assert (len(one.snapshot.sets), one.snapshot.counters.evictions) == (2, 1)
    assert one.use(FLOAT8, (large, 1.0)) == "switched"
    assert len(one.snapshot.sets) == 1
    assert one.snapshot.counters.evictions == 3


def test_a_budget_without_room_for_a_text_encoder_lets_a_set_go_instead(
    cache: Callable[[int | None], _Cache],
) -> None:
    measured = cache(None)
    measured.use(FLOAT8)
    parts, bare = measured.snapshot.trainer_parts_bytes["mini"], measured.snapshot.sets[0].size_bytes
    without = measured.checkpoint.missing_bytes(PROFILES["preview"], INT8)
    assert without > 0
    one = cache(2 * bare + parts + without // 2)
    one.use(FLOAT8)
    assert one.use(INT8) == "built"
    assert [held.key.trainer for held in one.snapshot.sets] == [INT8]
    assert one.snapshot.counters.evictions == 1


def test_no_more_sets_leave_than_free_the_memory_that_is_needed(
    cache: Callable[[int | None], _Cache],
    adapter: Callable[[_Cache, int, int], Adapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device memory is free once nobody holds on to what left."""
    one = cache(2**40)
    small, other, large = (adapter(one, rank, rank) for rank in (16, 20, 500))
    one.use(FLOAT8, (small, 1.0))
    one.use(FLOAT8, (other, 1.0))
    one.use(None, profile="reference")
    alive = [weakref.ref(slot.transformer) for slot in one.cache._slots]
    monkeypatch.setattr(
        DeviceRoom, "_fits", lambda _room, needed: needed <= 0 or sum(ref() is not None for ref in alive) < 3
    )
    monkeypatch.setattr(DeviceRoom, "fits_without_idle", lambda room, needed, *_: room._fits(needed))
    assert one.use(FLOAT8, (large, 1.0)) == "switched"
    assert len(one.snapshot.sets) == 2, "one of three has left"


def test_a_set_that_left_for_weights_that_were_not_finished_is_not_called_resident(
    cache: Callable[[int | None], _Cache],
) -> None:
    measured = cache(None)
    measured.use(FLOAT8)
    one = cache(measured.snapshot.sets[0].size_bytes + measured.snapshot.trainer_parts_bytes["mini"])
    one.use(FLOAT8)
    key = one.snapshot.sets[0].key

    def stop() -> None:
        raise JobCancelled("enough")

    wanted = SetKey("mini", "reference", ())
    with pytest.raises(JobCancelled):
        one.cache.pipeline(one.checkpoint, (), wanted, LoadContext(check=stop))
    assert not one.snapshot.holds(key)
