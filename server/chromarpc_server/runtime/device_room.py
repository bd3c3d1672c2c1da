"""Who leaves first where a device is short of memory.

Transformers, with the adapters beside their weights, and text encoders of the preview profiles share one budget.
A text encoder that no resident transformer takes leaves first, then transformers, the least recently used ones
first. What the job at hand needs stays, whatever the budget says.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from chromarpc_server.domain.limits import Budgets
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import Checkpoint, DeviceChoice, Transformer, release_memory, usable_memory_bytes

CPU_BUDGET_BYTES = 256 * 1024**2
"""On a CPU, where no budget was set."""
FREE_SHARE = 0.25
"""Of what is to come, kept free beside it for activations on a GPU, where no budget was set."""
FREE_BYTES = 6 * 1024**3
"""Kept free in any case on a GPU, where no budget was set."""


class Resident(Protocol):
    """A transformer in memory, of a checkpoint."""

    transformer: Transformer
    checkpoint: Checkpoint


Slot = TypeVar("Slot", bound=Resident)


class DeviceRoom(Generic[Slot]):
    """Makes room on the device. Lives on its thread. The lists stay their owner's, who changes them too."""

    def __init__(
        self,
        device: DeviceChoice,
        budgets: Budgets,
        checkpoints: Mapping[str, Checkpoint],
        slots: list[Slot],
    ) -> None:
        """Evicts nothing.

        Args:
            device: where it is.
            budgets: `prepared_bytes` is for transformers and the preview profiles' parts together; without it,
                what a GPU has to spare within the operator's limit, or `CPU_BUDGET_BYTES`.
            checkpoints: least recently used first.
            slots: the same.
        """
        self._device = device
        self._budgets = budgets
        self._checkpoints = checkpoints
        self._slots = slots

    @property
    def set_bytes(self) -> int:
        """Of the transformers, with what lies beside their weights."""
        return sum(slot.transformer.size_bytes for slot in self._slots)

    def fits_without_idle(self, needed: int, checkpoint: Checkpoint, trainer: TrainerSettings | None) -> bool:
        """Whether this fits beside the transformers that are there; idle text encoders are dropped for it, none in
        vain.

        Args:
            needed: bytes.
            checkpoint: of the job at hand.
            trainer: the settings of its text encoder, which is not idle.
        """
        idle = sum(held.trainer_parts.idle_bytes(self._taken(held, checkpoint, trainer)) for held in self._all())
        if not self._fits(needed - idle):
            return False
        while not self._fits(needed):
            if not self._drop_idle(checkpoint, trainer):
                return False  # less became free than it held
        return True

    def make(self, needed: int, checkpoint: Checkpoint, trainer: TrainerSettings | None, *, keep: Slot) -> int:
        """Evicts until this fits, or nothing is left but what the job needs. Returns how many transformers went.

        Args:
            needed: bytes; nothing is evicted for none.
            checkpoint: of the job at hand.
            trainer: its settings.
            keep: its transformer.
        """
        evicted = 0
        while needed > 0 and not self.fits_without_idle(needed, checkpoint, trainer):
            leaving = next((slot for slot in self._slots if slot is not keep), None)
            if leaving is None:
                while self._drop_idle(checkpoint, trainer):
                    pass
                break
            self._slots.remove(leaving)
            del leaving
            evicted += 1
            self.free()
        return evicted

    def free(self) -> None:
        """Gives what nobody holds any more back to the device."""
        gc.collect()
        for card in self._device.cards:
            release_memory(card)

    def _fits(self, needed: int) -> bool:
        budget = self._budgets.prepared_bytes
        if budget is None and self._device.device.type == "cuda":
            limit = self._budgets.memory.device_bytes
            free = min(usable_memory_bytes(card, limit) for card in self._device.cards)
            return free >= needed + max(FREE_BYTES, FREE_SHARE * needed)
        parts = sum(checkpoint.trainer_parts.size_bytes for checkpoint in self._all())
        return self.set_bytes + parts + needed <= (CPU_BUDGET_BYTES if budget is None else budget)

    def _drop_idle(self, checkpoint: Checkpoint, trainer: TrainerSettings | None) -> bool:
        """Drops one text encoder that nobody takes. Returns whether there was one."""
        for held in self._all():
            if held.trainer_parts.drop_idle(self._taken(held, checkpoint, trainer)):
                self.free()
                return True
        return False

    def _taken(
        self, held: Checkpoint, checkpoint: Checkpoint, trainer: TrainerSettings | None
    ) -> list[TrainerSettings]:
        """Whose text encoders a checkpoint's resident transformers take, and the job at hand."""
        taken = [slot.transformer.text_settings for slot in self._slots if slot.checkpoint is held]
        wanted = [*taken, trainer if held is checkpoint else None]
        return [settings for settings in wanted if settings is not None]

    def _all(self) -> list[Checkpoint]:
        return list(self._checkpoints.values())
