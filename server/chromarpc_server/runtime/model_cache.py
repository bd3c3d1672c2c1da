"""What is resident on the device: checkpoints, and transformers with adapter sets merged.

Lives on the device thread. A job whose set is resident runs at once; any other one gets a transformer of its own
while the budget allows, and else the least recently used one, switched in place. What the preview profiles have
besides counts with it: adapters beside weights, and text encoders of the trainer's, of which those that no
resident set takes leave first. The event loop sees snapshots.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from chromarpc_server.adapters.file import AdapterFile, require_expected
from chromarpc_server.domain.errors import ChromaError, OutOfMemory
from chromarpc_server.domain.events import WeightsReport, WeightsSource
from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.limits import Budgets
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Check,
    Checkpoint,
    CheckpointFiles,
    DeviceChoice,
    LoadContext,
    Pipeline,
    SwitchReport,
    Transformer,
    forget_frames,
    synchronize,
    translate_memory_error,
)
from chromarpc_server.runtime.device_room import DeviceRoom
from chromarpc_server.runtime.host_share import HostShare

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetKey:
    """Prepared weights as jobs ask for them, before any file was read."""

    model_id: str
    profile: str
    adapters: tuple[tuple[AdapterFile, float], ...]
    trainer: TrainerSettings | None = None
    """What the trainer's config decides about the weights, in profiles that draw the trainer's image."""
    rounded: bool = True
    """Whether weights go through float8 as the reference's do."""

    @classmethod
    def of(
        cls,
        model_id: str,
        profile: str,
        files: Sequence[AdapterFile],
        loras: Sequence[PlannedLora],
        trainer: TrainerSettings | None = None,
        *,
        rounded: bool = True,
    ) -> SetKey:
        """Adapters at multiplier 0 change nothing, so they make no set of their own."""
        pairs = ((file, lora.network_multiplier) for file, lora in zip(files, loras, strict=True))
        return cls(model_id, profile, tuple(pair for pair in pairs if pair[1] != 0), trainer, rounded)


def _as_held(key: SetKey, memory: MemoryPlan | None) -> SetKey:
    """One set for both where rounded and unrounded weights would be the same; `memory`: of the key's model."""
    return replace(key, rounded=key.rounded or PROFILES[key.profile].must_round(memory))


@dataclass(frozen=True)
class ResidentSet:
    """Prepared weights, as they are reported to clients."""

    key: SetKey
    adapters: tuple[tuple[str, float], ...]
    """sha256 and multiplier."""
    size_bytes: int


@dataclass(frozen=True)
class CacheCounters:
    """Since the server started."""

    hits: int = 0
    """Jobs whose set was resident."""
    switches: int = 0
    """Jobs for which a resident transformer was switched in place."""
    builds: int = 0
    """Jobs for which a transformer was built."""
    evictions: int = 0
    """Sets that made room, by being switched or dropped."""


@dataclass(frozen=True)
class CacheSnapshot:
    """What is resident."""

    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    """Model id to bytes, prepared weights and the preview profiles' own parts included."""
    trainer_parts_bytes: Mapping[str, int] = field(default_factory=dict)
    """Model id to bytes of the preview profiles' own text encoders and autoencoders."""
    sets: tuple[ResidentSet, ...] = ()
    counters: CacheCounters = CacheCounters()
    adapter_bytes: int = 0
    """Of parsed adapters in host memory, and of what was made of them there."""
    memory: Mapping[str, MemoryPlan] = field(default_factory=dict)
    """Model id to what of it stays where on a GPU."""
    fallbacks: tuple[DeviceFallback, ...] = ()
    """What the device does without, as far as anything was tried."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """Model id to the hash of its weights, as they were read."""

    def holds(self, key: SetKey) -> bool:
        """Whether a job with this key would run at once."""
        wanted = _as_held(key, self.memory.get(key.model_id))
        return any(held.key == wanted for held in self.sets)


@dataclass
class _Slot:
    """A transformer, and the set that is merged into it; None while that is not certain."""

    transformer: Transformer
    checkpoint: Checkpoint
    key: SetKey | None = None
    adapters: tuple[tuple[str, float], ...] = ()


class ModelCache:
    """Least recently used out first. What the running job uses stays: only a job's own call evicts."""

    def __init__(
        self,
        device: DeviceChoice,
        budgets: Budgets,
        *,
        publish: Callable[[CacheSnapshot], None],
        share: HostShare | None = None,
    ) -> None:
        """Holds nothing yet.

        Args:
            device: where the weights lie.
            budgets: how much may be resident there.
            publish: called with every change, on the device thread.
            share: what it has in common with other devices of this host; by default nothing.
        """
        self._device = device
        self._budgets = budgets
        self._publish = publish
        self._checkpoints: OrderedDict[str, Checkpoint] = OrderedDict()
        self._slots: list[_Slot] = []
        """Least recently used first."""
        self._room = DeviceRoom(device, budgets, self._checkpoints, self._slots)
        self._share = share or HostShare.within(budgets)
        self._counters = CacheCounters()
        self._fallbacks: tuple[DeviceFallback, ...] = ()

    def checkpoint(self, model_id: str, files: CheckpointFiles, context: LoadContext) -> Checkpoint:
        """The model's checkpoint, loaded if it is not resident.

        Raises:
            WeightsInvalid: the files cannot be used.
            OutOfMemory: they do not fit.
        """
        found = self._checkpoints.get(model_id)
        if found is not None:
            self._checkpoints.move_to_end(model_id)
            return found
        while len(self._checkpoints) >= self._budgets.max_checkpoints:
            self._evict_checkpoint()
        began = time.monotonic()
        loaded = self._load(files, context)
        self._checkpoints[model_id] = loaded
        seconds = round(time.monotonic() - began, 2)
        log.info("checkpoint.loaded", extra={"model": model_id, "seconds": seconds, "bytes": loaded.size_bytes})
        if loaded.memory is not None:
            log.info("memory.planned", extra={"model": model_id, **asdict(loaded.memory)})
        self._publish_snapshot()
        return loaded

    def _load(self, files: CheckpointFiles, context: LoadContext) -> Checkpoint:
        """Loads a checkpoint. Others leave where it has no room beside them, or only for streamed blocks."""
        while True:
            try:
                return Checkpoint.load(
                    files,
                    device=self._device.device,
                    dtype=self._device.dtype,
                    second=self._device.second,
                    memory=replace(self._budgets.memory, streaming=not self._checkpoints),
                    context=context,
                    weights=self._share.weights,
                )
            except OutOfMemory:
                if not self._checkpoints:
                    raise
            self._evict_checkpoint()

    def read_adapters(
        self, checkpoint: Checkpoint, loras: Sequence[PlannedLora], files: Sequence[AdapterFile], *, check: Check
    ) -> tuple[tuple[Adapter, float], ...]:
        """A job's adapters, in order, blaming the right one when a file cannot be used."""
        adapters: list[tuple[Adapter, float]] = []
        for index, (lora, file) in enumerate(zip(loras, files, strict=True)):
            check()
            try:
                adapter = self._share.adapters.read(file, checkpoint.revision, checkpoint.targets, check=check)
            except ChromaError as error:
                raise error.at(f"loras.{index}.path") from None
            require_expected(lora, adapter.sha256, index)
            adapters.append((adapter, lora.network_multiplier))
        return tuple(adapters)

    def pipeline(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
        key: SetKey,
        context: LoadContext,
    ) -> tuple[Pipeline, WeightsReport]:
        """The checkpoint with these adapters merged. Good until the next call.

        Raises:
            LoraIncompatible: an adapter does not fit.
            OutOfMemory: the prepared weights do not fit.
        """
        started, evictions = time.monotonic(), self._counters.evictions
        profile = PROFILES[key.profile]
        key = _as_held(key, checkpoint.memory)
        try:
            slot = next((slot for slot in self._slots if slot.key == key), None)
            if slot is not None:
                self._slots.remove(slot)
                self._slots.append(slot)
                source, switched = WeightsSource.RESIDENT, SwitchReport(0)
                self._counters = replace(self._counters, hits=self._counters.hits + 1)
            else:
                slot, source, switched = self._make(checkpoint, adapters, key, context)
                self._share.adapters.trim()  # what lies beside weights was made of them
            missing = checkpoint.missing_bytes(profile, key.trainer, rounded=key.rounded)
            self._make_room(missing, checkpoint, key, keep=slot)
            pipeline = checkpoint.pipeline(slot.transformer, context)
        finally:
            # What left for it is gone, whether it was stopped or not.
            self._publish_snapshot()
        report = WeightsReport(
            source=source,
            rewritten_tensors=switched.rewritten_tensors,
            duration_s=time.monotonic() - started,
            resident_sets=len(self._slots),
            resident_bytes=self._room.set_bytes,
            evicted_sets=self._counters.evictions - evictions,
        )
        return pipeline, report

    def publish_fallbacks(self) -> None:
        """Publishes what turned out while something ran."""
        if self._found_fallbacks() != self._fallbacks:
            self._publish_snapshot()

    def clear(self, *, host: bool = True) -> None:
        """Drops everything that is the device's; the next job loads anew.

        `host`: also what all devices of the host can read again.
        """
        for card in self._device.cards:
            synchronize(card)  # copies may be on their way out of what is dropped
        self._slots.clear()
        self._checkpoints.clear()
        if host:
            self._share.adapters.clear()
        self._room.free()
        self._publish_snapshot()

    def _make(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
        key: SetKey,
        context: LoadContext,
    ) -> tuple[_Slot, WeightsSource, SwitchReport]:
        alike = [
            slot
            for slot in self._slots
            if slot.checkpoint is checkpoint
            and slot.transformer.profile.name == key.profile
            and slot.transformer.settings == key.trainer
            and slot.transformer.rounded == key.rounded
        ]
        broken = next((slot for slot in alike if slot.key is None), None)
        profile = PROFILES[key.profile]
        needed = checkpoint.prepared_bytes(profile, key.trainer, adapters)
        needed += checkpoint.missing_bytes(profile, key.trainer, rounded=key.rounded)
        text = checkpoint.text_settings(profile, key.trainer, rounded=key.rounded)
        if broken is None and (not alike or self._room.fits_without_idle(needed, checkpoint, text)):
            fresh = self._allocate(checkpoint, key, needed)
            try:
                return fresh, WeightsSource.BUILT, self._switch(fresh, adapters, key, context)
            except Exception as error:
                if not alike or translate_memory_error(error) is None:
                    raise
                # There was less room than it seemed: switch what is there instead.
                self._slots.remove(fresh)
                del fresh
                forget_frames(error)
                self._room.free()
        slot = broken or alike[0]
        # Nothing here may hold on to a transformer that is to leave: its memory would not become free.
        del alike, broken
        self._make_room(slot.transformer.growth_bytes(adapters), checkpoint, key, keep=slot)
        if slot.key is not None:
            self._counters = replace(self._counters, evictions=self._counters.evictions + 1)
        return slot, WeightsSource.SWITCHED, self._switch(slot, adapters, key, context)

    def _switch(
        self,
        slot: _Slot,
        adapters: Sequence[tuple[Adapter, float]],
        key: SetKey,
        context: LoadContext,
    ) -> SwitchReport:
        built = not slot.transformer.size_bytes
        slot.key = None
        report = slot.transformer.switch(adapters, context)
        slot.key = key
        slot.adapters = tuple((adapter.sha256, multiplier) for adapter, multiplier in adapters if multiplier != 0)
        self._slots.remove(slot)
        self._slots.append(slot)
        counters = self._counters
        if built:
            self._counters = replace(counters, builds=counters.builds + 1)
        else:
            self._counters = replace(counters, switches=counters.switches + 1)
        return report

    def _allocate(self, checkpoint: Checkpoint, key: SetKey, needed: int) -> _Slot:
        profile = PROFILES[key.profile]
        slot = _Slot(checkpoint.allocate(profile, key.trainer, rounded=key.rounded), checkpoint)
        self._make_room(needed, checkpoint, key, keep=slot)
        self._slots.append(slot)
        return slot

    def _make_room(self, needed: int, checkpoint: Checkpoint, key: SetKey, *, keep: _Slot) -> None:
        """Evicts what has to go for this many bytes more."""
        text = checkpoint.text_settings(PROFILES[key.profile], key.trainer, rounded=key.rounded)
        evicted = self._room.make(needed, checkpoint, text, keep=keep)
        self._counters = replace(self._counters, evictions=self._counters.evictions + evicted)

    def _evict_checkpoint(self) -> None:
        for card in self._device.cards:
            synchronize(card)  # copies may be on their way out of what the host has for it
        _, evicted = self._checkpoints.popitem(last=False)
        before = len(self._slots)
        self._slots[:] = [slot for slot in self._slots if slot.checkpoint is not evicted]
        self._counters = replace(self._counters, evictions=self._counters.evictions + before - len(self._slots))
        del evicted  # so that its memory becomes free
        self._room.free()
        self._publish_snapshot()

    def _found_fallbacks(self) -> tuple[DeviceFallback, ...]:
        if not self._slots:
            return self._fallbacks  # nothing is there that could show a change
        found = {
            fallback.without: fallback
            for slot in self._slots
            for fallback in slot.checkpoint.fallbacks(slot.transformer)
        }
        return tuple(found.values())

    def _publish_snapshot(self) -> None:
        parts = {model_id: held.trainer_parts.size_bytes for model_id, held in self._checkpoints.items()}
        resident = {
            model_id: checkpoint.size_bytes + parts[model_id] for model_id, checkpoint in self._checkpoints.items()
        }
        for slot in self._slots:
            for model_id, checkpoint in self._checkpoints.items():
                if checkpoint is slot.checkpoint:
                    resident[model_id] += slot.transformer.size_bytes
        sets = tuple(
            ResidentSet(slot.key, slot.adapters, slot.transformer.size_bytes)
            for slot in self._slots
            if slot.key is not None
        )
        memory = {
            model_id: checkpoint.memory
            for model_id, checkpoint in self._checkpoints.items()
            if checkpoint.memory is not None
        }
        self._fallbacks = self._found_fallbacks()
        self._publish(
            CacheSnapshot(
                resident_bytes=resident,
                trainer_parts_bytes=parts,
                sets=sets,
                counters=self._counters,
                adapter_bytes=self._share.adapters.size_bytes,
                memory=memory,
                fallbacks=self._fallbacks,
                revisions={model_id: held.revision for model_id, held in self._checkpoints.items()},
            )
        )
