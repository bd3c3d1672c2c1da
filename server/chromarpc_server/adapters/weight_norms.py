"""Norms of a model's own parameters, to which the strength of adapters is compared; each is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError


class WeightNorms:
    """Kept as long as the process; a few numbers for each model. Safe to call from any thread."""

    def __init__(self) -> None:
        self._known: dict[Hashable, dict[str, float]] = {}
        """By the model's files and their versions, then by parameter."""
        self._lock = threading.Lock()

    def squared(
        self, part: StoredPart, names: Collection[str], *, check: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """‖W‖² of each parameter in Frobenius' sense; what is not known yet is read from the files.

        Args:
            part: the model's transformer.
            names: of parameters in it.
            check: called between parameters; may raise to stop, which keeps what was computed.

        Raises:
            WeightsInvalid: a file cannot be read.
        """
        with self._lock:
            known = self._known.setdefault(part.identity, {})
        missing = [name for name in part.recipes if name in names and name not in known]
        wanted = {piece for name in missing for piece in part.recipes[name].pieces}
        try:
            # Mapped: what is not looked at takes no memory.
            pieces = {name: tensor for file in part.files for name, tensor in file.header.read(wanted)}
        except TensorFileError:
            raise WeightsInvalid(f"{part.name} cannot be read") from None
        for name in missing:
            check()
            recipe = part.recipes[name]
            weight = recipe.make([pieces[piece] for piece in recipe.pieces])
            # Float32 takes the square of any bf16 weight that a model can have; its sums are pairwise.
            known[name] = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
        return {name: known[name] for name in names}
