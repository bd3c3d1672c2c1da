"""Norms of a model's own parameters, to which the strength of adapters is compared; each is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsError, SafetensorsFile


class WeightNorms:
    """Kept as long as the process; a few numbers for each model. Safe to call from any thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], dict[str, float]] = {}
        """By the file and its version, then by parameter."""
        self._lock = threading.Lock()

    def squared(
        self, file: SafetensorsFile, names: Collection[str], *, check: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """‖W‖² of each parameter in Frobenius' sense; what is not known yet is read from the file.

        Args:
            file: the model's transformer.
            names: of parameters in it.
            check: called between parameters; may raise to stop, which keeps what was computed.

        Raises:
            WeightsInvalid: the file cannot be read.
        """
        try:
            status = file.path.stat()
            key = (str(file.path), status.st_size, status.st_mtime_ns)
            with self._lock:
                known = self._known.setdefault(key, {})
            missing = {name for name in names if name not in known}
            for name, weight in file.read(missing) if missing else ():
                check()
                # Float32 takes the square of any bf16 weight that a model can have; its sums are pairwise.
                known[name] = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
        except (SafetensorsError, OSError):
            raise WeightsInvalid(f"{file.path.name} cannot be read") from None
        return {name: known[name] for name in names}
