"""The tiny model in both preview profiles, and sets of adapters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.domain.trainer import LokrForm, TrainerSettings
from chromarpc_server.pipeline import PROFILES, Adapter
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.pipeline.adapters.conftest import rel
from tests.tiny_checkpoint import GOLDENS

CPU = torch.device("cpu")
BASE = GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors"
FLOAT32 = TrainerSettings(dtype="float32")
OLD_LOKR = TrainerSettings(dtype="float32", lokr_form=LokrForm.WEIGHT)
Set = list[tuple[Adapter, float]]
Build = Callable[..., FusedPreview]

SETS = {
    "none": (),
    "rank 16": (("rank 16", 1.0),),
    "rank 16 at another multiplier": (("rank 16", -0.3),),
    "another of rank 16": (("another of rank 16", 1.0),),
    "rank 100": (("rank 100", 0.8),),
    "several": (("rank 16", 0.7), ("rank 100", -0.4), ("aitk", 1.0)),
    "the same twice": (("rank 16", 0.7), ("rank 16", 0.3)),
    "by rows": (("diffusers_peft", 0.8),),
    "with alphas": (("mixed_rank_alpha", 0.8), ("kohya", 0.5)),
    "lokr": (("aitk_lokr_full", 0.9),),
    "lokr of low rank": (("aitk_lokr_lowrank", 0.9),),
    "lokr and lora": (("aitk_lokr_full", 0.9), ("rank 16", 1.0)),
    "dora": (("kohya_dora", 1.0),),
    "dora over lora": (("rank 16", 1.0), ("kohya_dora", 0.6)),
    "loha": (("loha", 0.7),),
    "full": (("full_diff", 0.5), ("rank 16", 0.5)),
}
"""Adapters and multipliers by name; those with a rank are made for the tests, the others are recorded files."""


def exact(
    config: ChromaConfig, master: Mapping[str, Tensor], adapters: Set, settings: TrainerSettings
) -> ExactPreview:
    made = ExactPreview(config, as_they_are(master), PROFILES["preview-exact"], settings, device=CPU)
    made.switch(adapters)
    return made


@torch.inference_mode()
def velocity(model: FusedPreview | ExactPreview) -> Tensor:
    """Of one recorded input."""
    given = load_file(GOLDENS / "cpu_fp32" / "transformer_forward.safetensors")
    grid = (int(given["0.grid"][0]), int(given["0.grid"][1]))
    text = Text(given["0.txt"], given["0.txt_mask"])
    found, _ = model.velocity([text], given["0.timestep"], grid)(given["0.img"], 0)
    return found


def linears(model: FusedPreview) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.model.named_modules() if hasattr(module, "down")}


def held(model: FusedPreview) -> dict[str, Tensor]:
    """What the forward reads."""
    buffers = {name: tensor for name, tensor in model.model.named_buffers() if tensor is not None}
    return {**dict(model.model.named_parameters()), **buffers}


def assert_same(model: FusedPreview, cold: FusedPreview) -> None:
    found, expected = held(model), held(cold)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    # Rows that lie further apart may be summed in another order.
    assert rel(velocity(model), velocity(cold)) < 1e-6
