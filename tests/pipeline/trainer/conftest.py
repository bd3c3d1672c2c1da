"""What the tests of the preview profiles share: the tiny model, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import PROFILES, Adapter, read_adapter
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import linear_weights
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.pipeline.adapters.conftest import values
from tests.pipeline.trainer.models import (
    BASE,
    CPU,
    FLOAT32,
    SETS,
    Build,
    Set,
)
from tests.tiny_checkpoint import GOLDENS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def master() -> dict[str, Tensor]:
    return load_file(BASE)


@pytest.fixture(scope="module")
def config(master: dict[str, Tensor]) -> ChromaConfig:
    with safe_open(BASE, "pt") as file:
        return ChromaConfig.from_shapes({name: tensor.shape for name, tensor in master.items()}, file.metadata())


@pytest.fixture(scope="module")
def adapter_set(
    master: dict[str, Tensor], config: ChromaConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Set]:
    shapes = {name: tuple(tensor.shape) for name, tensor in master.items()}
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank, seed in (("rank 16", 16, 1), ("another of rank 16", 16, 2), ("rank 100", 100, 3)):
        tensors = {}
        for weight in linear_weights(config):
            module, (rows, columns) = weight.removesuffix(".weight"), master[weight].shape
            if module.startswith("distilled") and rank == 16:
                continue  # some layers have nothing beside them
            tensors[f"diffusion_model.{module}.lora_A.weight"] = values(rank, columns, seed=seed)
            tensors[f"diffusion_model.{module}.lora_B.weight"] = values(rows, rank, seed=seed + 10)
        save_file(tensors, folder / f"{name}.safetensors")
    known: dict[str, Adapter] = {}

    def read(name: str) -> Adapter:
        if name not in known:
            recorded = GOLDENS / "adapters" / f"{name}.safetensors"
            known[name] = read_adapter(recorded if recorded.is_file() else folder / f"{name}.safetensors", shapes)
        return known[name]

    return lambda name: [(read(one), multiplier) for one, multiplier in SETS[name]]


@pytest.fixture
def fused(master: dict[str, Tensor], config: ChromaConfig) -> Build:
    def build(
        adapters: Set | None = None, settings: TrainerSettings = FLOAT32, *, hold_float8: bool = False
    ) -> FusedPreview:
        made = FusedPreview(
            config,
            as_they_are(master),
            PROFILES["preview"],
            settings,
            DevicePlacement(CPU, torch.float32, hold_float8=hold_float8),
        )
        if adapters is not None:
            made.switch(adapters)
        return made

    return build
