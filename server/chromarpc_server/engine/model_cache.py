"""What is resident on the device: loaded checkpoints, and pipelines prepared from them.

Lives on the device thread. Keyed by content: a checkpoint by its model, a prepared pipeline by (checkpoint
revision, ordered adapters by sha256 with their multipliers, profile). The event loop sees snapshots only.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    CheckpointFiles,
    DeviceChoice,
    LoadProgress,
    Pipeline,
    read_adapter,
    release_memory,
)

Progress = Callable[[LoadProgress], None]
Check = Callable[[], None]
PreparedKey = tuple[str, tuple[tuple[str, float], ...], str]


@dataclass(frozen=True)
class CacheSnapshot:
    """What is resident: model id to bytes."""

    resident_bytes: Mapping[str, int] = field(default_factory=dict)


class ModelCache:
    """Least recently used out first, by count; what a running job uses is never evicted."""

    def __init__(
        self,
        device: DeviceChoice,
        *,
        max_checkpoints: int,
        max_prepared: int,
        publish: Callable[[CacheSnapshot], None],
    ) -> None:
        """`publish` is told of every change, on the device thread."""
        self._device = device
        self._max_checkpoints = max_checkpoints
        self._max_prepared = max_prepared
        self._publish = publish
        self._checkpoints: OrderedDict[str, Checkpoint] = OrderedDict()
        self._prepared: OrderedDict[PreparedKey, Pipeline] = OrderedDict()

    def checkpoint(self, model_id: str, files: CheckpointFiles, *, progress: Progress, check: Check) -> Checkpoint:
        """The model's checkpoint, loaded if it is not resident.

        Raises:
            WeightsInvalid: the files cannot be used.
            OutOfMemory: they do not fit.
        """
        found = self._checkpoints.get(model_id)
        if found is not None:
            self._checkpoints.move_to_end(model_id)
            return found
        while len(self._checkpoints) >= self._max_checkpoints:
            self._evict_checkpoint(next(iter(self._checkpoints)))
        loaded = Checkpoint.load(
            files, device=self._device.device, dtype=self._device.dtype, progress=progress, check=check
        )
        self._checkpoints[model_id] = loaded
        self._tell()
        return loaded

    def read_adapters(
        self, checkpoint: Checkpoint, loras: Sequence[PlannedLora], paths: Sequence[Path], *, check: Check
    ) -> tuple[tuple[Adapter, float], ...]:
        """Reads a job's adapters, in order, blaming the right one when a file cannot be used."""
        adapters: list[tuple[Adapter, float]] = []
        for index, (lora, path) in enumerate(zip(loras, paths, strict=True)):
            check()
            try:
                adapter = read_adapter(path, checkpoint.targets)
            except ChromaError as error:
                raise error.at(f"loras.{index}.path") from None
            adapters.append((adapter, lora.network_multiplier))
        return tuple(adapters)

    def pipeline(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
        profile: str,
        *,
        progress: Progress,
        check: Check,
    ) -> Pipeline:
        """The checkpoint with these adapters merged, prepared if it is not resident.

        Raises:
            LoraIncompatible: an adapter does not fit.
            OutOfMemory: the prepared weights do not fit.
        """
        key = (
            checkpoint.revision,
            tuple((adapter.sha256, multiplier) for adapter, multiplier in adapters),
            profile,
        )
        found = self._prepared.get(key)
        if found is not None:
            self._prepared.move_to_end(key)
            return found
        while len(self._prepared) >= self._max_prepared:
            self._prepared.popitem(last=False)
            self._free()
        prepared = checkpoint.prepare(adapters, PROFILES[profile], progress=progress, check=check)
        self._prepared[key] = prepared
        self._tell()
        return prepared

    def clear(self) -> None:
        """Drops everything; the next job loads anew."""
        self._prepared.clear()
        self._checkpoints.clear()
        self._free()
        self._tell()

    def _evict_checkpoint(self, model_id: str) -> None:
        revision = self._checkpoints.pop(model_id).revision
        for key in [key for key in self._prepared if key[0] == revision]:
            del self._prepared[key]
        self._free()
        self._tell()

    def _free(self) -> None:
        gc.collect()
        release_memory(self._device.device)

    def _tell(self) -> None:
        resident = {model_id: checkpoint.size_bytes for model_id, checkpoint in self._checkpoints.items()}
        for (revision, _, _), pipeline in self._prepared.items():
            for model_id, checkpoint in self._checkpoints.items():
                if checkpoint.revision == revision:
                    resident[model_id] += pipeline.size_bytes
        self._publish(CacheSnapshot(resident))
