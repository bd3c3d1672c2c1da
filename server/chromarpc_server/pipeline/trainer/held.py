"""What is merged into each parameter, so that another adapter rewrites only the parameters that it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.merged_transformer import on_device
from chromarpc_server.pipeline.progress import LoadContext, LoadProgress
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES
from chromarpc_server.pipeline.trainer.paths import Placed, Placement, require_finite_weights
from chromarpc_server.pipeline.weights.stored import StoredTensor

Write = Callable[[str, Tensor, Sequence[Placed], Sequence[Placed]], Tensor]
"""Puts a parameter where it is held: name, stored weight, what is merged, what is added once it is quantized.

Returns what was written, to see whether it is finite.
"""


class HeldWeights:
    """Keeps account of one transformer's parameters. Belongs to the thread that owns the device."""

    def __init__(
        self, master: Mapping[str, StoredTensor], settings: TrainerSettings, *, device: torch.device
    ) -> None:
        """Writes nothing; the first `rewrite` writes every parameter.

        Args:
            master: parameters by name, as they are stored, on the device or in host memory.
            settings: what the trainer's config says; weights are written from the dtype it names.
            device: where they are written.
        """
        self._master = master
        self._dtype = TORCH_DTYPES[settings.dtype]
        self._qtype = settings.qtype if settings.quantize else None
        self._device = device
        self._merged: dict[str, tuple[tuple[str, float], ...] | None] = dict.fromkeys(master)
        """None where a parameter's contents are unknown."""

    def rewrite(self, placement: Placement, write: Write, context: LoadContext) -> int:
        """Writes the parameters into which something else is merged than before. Returns their count.

        Stopped or failing, it leaves parameters that the next call writes again.

        Args:
            placement: what to merge and to add.
            write: see `Write`.
            context: reports how many bytes of those to write are done; checked between tensors.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: a weight has a row that the quantizer turns into NaN.
        """
        merged, added = placement.merged, placement.added
        wanted = {
            name: tuple(placed.key for placed in (*merged.get(name, ()), *added.get(name, ())))
            for name in self._master
        }
        stale = [name for name in self._master if self._merged[name] != wanted[name]]
        total, done = sum(self._master[name].nbytes for name in stale), 0
        finite: dict[str, Tensor] = {}
        for name, weight in on_device(self._master, stale, self._device):
            context.check()
            self._merged[name] = None
            written = write(name, weight.to(self._dtype), merged.get(name, ()), added.get(name, ()))
            finite[name] = torch.isfinite(written).all()
            self._merged[name] = wanted[name]
            done += self._master[name].nbytes
            context.progress(LoadProgress("quantizing" if self._qtype else "merging", done, total))
        try:
            require_finite_weights(finite, wanted, self._qtype)
        except ChromaError:
            self._merged.update(dict.fromkeys(finite))
            raise
        return len(stale)
