"""A model for adapters to change, and files to change it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.pipeline.adapters import Adapter, read_adapter


@dataclass(frozen=True)
class Model:
    """The tiny transformer's weights, and adapters read for it."""

    weights: Mapping[str, Tensor]
    folder: Path

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()}

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
        """Writes an adapter's file and reads it."""
        path = self.folder / "adapter.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(metadata or {}))
        return read_adapter(path, self.targets)


@pytest.fixture(scope="session")
def weights(goldens: Path) -> dict[str, Tensor]:
    return load_file(goldens / "cpu_fp32" / "transformer_tiny.safetensors")


@pytest.fixture
def model(weights: dict[str, Tensor], tmp_path: Path) -> Model:
    return Model(weights, tmp_path)


Draw = Callable[..., Tensor]


@pytest.fixture
def draw() -> Draw:
    """Random tensors of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.2
