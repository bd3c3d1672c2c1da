"""What the adapter tests share: the tiny model's weights, and files written for the occasion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.pipeline.adapters import Adapter, read_adapter
from tests.tiny_checkpoint import GOLDENS

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def base() -> dict[str, Tensor]:
    return load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")


@pytest.fixture(scope="session")
def targets(base: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in base.items()}


@pytest.fixture
def read(tmp_path: Path, targets: Shapes) -> Callable[..., Adapter]:
    """Writes tensors as a file and reads it as an adapter of the tiny model."""

    def write_and_read(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Adapter:
        save_file(dict(tensors), tmp_path / "adapter.safetensors", metadata)
        return read_adapter(tmp_path / "adapter.safetensors", targets)

    return write_and_read


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values times 0.1."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def rel(found: Tensor, expected: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
