"""Flux's autoencoder comes out of both layouts under diffusers' names, with its sizes."""

from __future__ import annotations

import json

import pytest
import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.autoencoder import build_autoencoder
from chromarpc_server.pipeline.weights.formats.autoencoder import autoencoder_part
from chromarpc_server.pipeline.weights.stored import StoredTensor
from tests.pipeline.formats.layouts import FORMATS, header_shapes, recipes_of

ORIGINAL = header_shapes(FORMATS / "ae.safetensors")
DIFFUSERS = header_shapes(FORMATS / "expected" / "vae.expected.safetensors")
CONFIG = json.loads((FORMATS / "vae_config.json").read_text())


@pytest.mark.parametrize("shapes", [ORIGINAL, DIFFUSERS], ids=["original", "diffusers"])
def test_both_layouts_have_diffusers_names_and_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    part = autoencoder_part(recipes_of(shapes), "ae.safetensors", CONFIG)
    assert {name: recipe.shape for name, recipe in part.recipes.items()} == DIFFUSERS


def test_attention_becomes_matrices_with_the_same_values() -> None:
    part = autoencoder_part(recipes_of(ORIGINAL), "ae.safetensors", CONFIG)
    recipe = part.recipes["decoder.mid_block.attentions.0.to_q.weight"]
    (piece,) = recipe.pieces
    stored = torch.arange(256.0).view(ORIGINAL[piece])
    assert StoredTensor(recipe, (stored,)).dense().equal(stored.view(16, 16))


def test_sizes_and_fluxs_constants_come_without_a_config() -> None:
    part = autoencoder_part(recipes_of(_wide(ORIGINAL)), "ae.safetensors")
    assert part.config["block_out_channels"] == [32, 32, 64, 64]
    assert part.config["latent_channels"] == 16
    assert (part.config["scaling_factor"], part.config["shift_factor"]) == (0.3611, 0.1159)
    weights = {name: torch.zeros(recipe.shape) for name, recipe in part.recipes.items()}
    built = build_autoencoder(part.config, weights, device=torch.device("cpu"), dtype=torch.float32)
    assert built.config.norm_num_groups == 32


def _wide(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same layout four times as wide, with as many latent channels."""
    wide: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        sides = [side * 4 if side in (8, 16) else side for side in shape]
        if name == "decoder.conv_in.weight":
            sides[1] = 16
        if name.startswith("encoder.conv_out."):
            sides[0] = 32
        wide[name] = tuple(sides)
    return wide


def test_sizes_that_are_not_fluxs_need_a_config() -> None:
    with pytest.raises(WeightsInvalid, match=r"do not divide into 32 groups.*config\.json"):
        autoencoder_part(recipes_of(ORIGINAL), "ae.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_in.weight": None}, "no tensor 'decoder.conv_in.weight'"),
        ({"encoder.down.0.block.0.conv1.weight": (8,)}, "shape"),
        (
            {"encoder.down.0.downsample.conv.bias": None},
            "no tensor for 'encoder.down_blocks.0.downsamplers.0.conv.bias'",
        ),
        ({f"encoder.down.{level}.block.0.conv1.weight": (8, 8, 3, 3) for level in range(20)}, "20 levels of 1"),
        ({"encoder.down.0.block.999.conv1.weight": (8, 8, 3, 3)}, "4 levels of 1000 blocks"),
        ({f"encoder.{number}": (8,) for number in range(3000)}, "it has 3176 tensors"),
        ({"something.else": (8,)}, r"1 tensors belong to no autoencoder of Flux's kind: 'something.else'"),
        ({"decoder.mid.attn_1.q.weight": (16, 16, 2, 2)}, "to_q.weight' has the shape"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = {name: shape for name, shape in {**ORIGINAL, **change}.items() if shape is not None}
    with pytest.raises(WeightsInvalid, match=message):
        autoencoder_part(recipes_of(shapes), "ae.safetensors", CONFIG)


def test_a_config_that_says_other_sizes_is_refused() -> None:
    with pytest.raises(WeightsInvalid, match="its config says layers_per_block '2', and its tensors have 1"):
        autoencoder_part(recipes_of(ORIGINAL), "vae", {**CONFIG, "layers_per_block": 2})


@pytest.mark.parametrize(
    "change", [{"scaling_factor": 0}, {"scaling_factor": "x"}, {"shift_factor": None}, {"norm_num_groups": "4"}]
)
def test_a_config_that_cannot_scale_latents_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(WeightsInvalid, match=f"its config says {next(iter(change))}"):
        autoencoder_part(recipes_of(DIFFUSERS), "vae", {**CONFIG, **change})


def test_a_config_that_diffusers_does_not_take_is_refused() -> None:
    config = {**CONFIG, "act_fn": "no such function"}
    with pytest.raises(WeightsInvalid, match="the autoencoder's config cannot be used"):
        build_autoencoder(config, {}, device=torch.device("cpu"), dtype=torch.float32)
