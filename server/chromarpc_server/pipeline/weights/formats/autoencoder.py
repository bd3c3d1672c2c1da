"""Flux's autoencoder, by diffusers' names, from diffusers' layout or the original one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.weights.stored import Recipe, Recipes
from chromarpc_server.pipeline.weights.tensor_file import shown

FLUX: Mapping[str, object] = MappingProxyType(
    {
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "act_fn": "silu",
        "sample_size": 1024,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
    }
)
"""What no tensor shows, as Flux's autoencoder has it."""
MAX_TENSORS = 2048
"""Eight times what Flux's has."""
MAX_LEVELS = MAX_LAYERS = 16
"""Of one half, each half as large as the one before; and in one of them."""


@dataclass(frozen=True)
class AutoencoderPart:
    """An autoencoder that a file holds."""

    recipes: Recipes = field(repr=False)
    """By diffusers' names."""
    config: Mapping[str, object]
    """What diffusers' `AutoencoderKL` is made of."""


def autoencoder_part(recipes: Recipes, name: str, config: Mapping[str, object] | None = None) -> AutoencoderPart:
    """An autoencoder under diffusers' names, with its sizes.

    Args:
        recipes: the file's tensors, in diffusers' layout or the original one.
        name: of the file, for messages.
        config: diffusers' own. Without one, sizes are read off the tensors and the rest is Flux's.

    Raises:
        WeightsInvalid: it cannot be told what it is, or the file holds tensors that belong to no autoencoder.
    """
    if len(recipes) > MAX_TENSORS:
        raise WeightsInvalid(f"{name}: not an autoencoder of Flux's kind: it has {len(recipes)} tensors")
    original = any(key.startswith(("encoder.down.", "decoder.up.")) for key in recipes)
    sizes = _sizes(recipes, name, original=original)
    if config is not None:
        _require_agreement(sizes, config, name)
    whole = {**FLUX, **sizes, **(config or {})}
    _require_groups(whole, name)
    _require_numbers(whole, name)
    return AutoencoderPart(_as_diffusers(recipes, whole, name) if original else recipes, whole)


def _sizes(recipes: Recipes, name: str, *, original: bool) -> dict[str, object]:
    """AutoencoderKL's sizes, off the tensors of either layout.

    Raises:
        WeightsInvalid: one that tells them is missing, or has another number of dimensions.
    """
    blocks, resnets = ("encoder.down.", "block.") if original else ("encoder.down_blocks.", "resnets.")

    def sides(tensor: str) -> tuple[int, ...]:
        recipe = recipes.get(tensor)
        if recipe is None:
            raise WeightsInvalid(f"{name}: not an autoencoder of Flux's kind: it has no tensor '{tensor}'")
        if len(recipe.shape) != 4 or not all(recipe.shape):
            raise WeightsInvalid(f"{name}: '{tensor}' has the shape {recipe.shape}")
        return recipe.shape

    widths: list[int] = []
    while any(key.startswith(f"{blocks}{len(widths)}.") for key in recipes):
        widths.append(sides(f"{blocks}{len(widths)}.{resnets}0.conv1.weight")[0])
    first = re.compile(re.escape(f"{blocks}0.{resnets}") + r"(\d{1,3})\.")
    layers = {int(match.group(1)) for key in recipes if (match := first.match(key))}
    attention = "encoder.mid.attn_1." if original else "encoder.mid_block.attentions.0."
    sides("encoder.conv_in.weight")
    if not widths or not layers:
        raise WeightsInvalid(f"{name}: not an autoencoder of Flux's kind: its encoder has no blocks")
    if len(widths) > MAX_LEVELS or max(layers) >= MAX_LAYERS:
        raise WeightsInvalid(
            f"{name}: not an autoencoder of Flux's kind: its encoder has {len(widths)} levels of "
            f"{1 + max(layers)} blocks"
        )
    return {
        "in_channels": sides("encoder.conv_in.weight")[1],
        "out_channels": sides("decoder.conv_out.weight")[0],
        "latent_channels": sides("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 1 + max(layers),
        "use_quant_conv": "quant_conv.weight" in recipes,
        "use_post_quant_conv": "post_quant_conv.weight" in recipes,
        "mid_block_add_attention": any(key.startswith(attention) for key in recipes),
    }


def _require_agreement(sizes: Mapping[str, object], config: Mapping[str, object], name: str) -> None:
    """Raises `WeightsInvalid` where a config says other sizes than the tensors have."""
    for key, size in sizes.items():
        said = config.get(key, size)
        if (list(said) if isinstance(said, (list, tuple)) else said) != size:
            raise WeightsInvalid(
                f"{name}: its config says {key} {shown(str(said))}, and its tensors have {size!r}"
            )


def _require_groups(config: Mapping[str, object], name: str) -> None:
    """Raises `WeightsInvalid` where the groups of its norms cannot be what they are taken for."""
    groups, widths = config["norm_num_groups"], config["block_out_channels"]
    if not isinstance(groups, int) or groups < 1 or not isinstance(widths, (list, tuple)):
        raise WeightsInvalid(f"{name}: its config says norm_num_groups {shown(str(groups))}")
    if any(width % groups for width in widths):
        raise WeightsInvalid(
            f"{name}: its channels {list(widths)} do not divide into {groups} groups, as those of Flux's do; "
            "lay its config.json beside it"
        )


def _require_numbers(config: Mapping[str, object], name: str) -> None:
    """Raises `WeightsInvalid` where latents cannot be scaled and shifted by what a config says."""
    for key in ("scaling_factor", "shift_factor"):
        said = config[key]
        if not isinstance(said, int | float) or not math.isfinite(said) or (key == "scaling_factor" and not said):
            raise WeightsInvalid(f"{name}: its config says {key} {shown(str(said))}")


def _as_diffusers(recipes: Recipes, config: Mapping[str, object], name: str) -> Recipes:
    """The same tensors under diffusers' names, attention as matrices instead of 1×1 convolutions.

    diffusers' converter does it. It is given labels in place of weights: a tensor's place in the file, with as
    many dimensions of one element as the weight has.
    """
    names = list(recipes)
    labels = {key: torch.full((1,) * len(recipes[key].shape), place) for place, key in enumerate(names)}
    try:
        converted = libraries().convert_autoencoder(labels, dict(config))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        raise WeightsInvalid(f"{name}: its tensors are not named as an autoencoder's of Flux's kind") from None
    found: dict[str, Recipe] = {}
    placed: set[int] = set()
    for new, label in converted.items():
        if label is None:  # the converter's word for a tensor that should be there
            raise WeightsInvalid(f"{name}: not an autoencoder of Flux's kind: it has no tensor for {shown(new)}")
        place = int(label.flatten()[0])
        placed.add(place)
        recipe = recipes[names[place]]
        found[new] = recipe if label.ndim == len(recipe.shape) else _as_matrix(recipe, new, name)
    lost = [one for place, one in enumerate(names) if place not in placed]
    if lost:
        few = ", ".join(shown(one) for one in sorted(lost)[:3])
        raise WeightsInvalid(f"{name}: {len(lost)} tensors belong to no autoencoder of Flux's kind: {few}")
    return found


def _as_matrix(recipe: Recipe, new: str, name: str) -> Recipe:
    """A 1×1 convolution's weight (out, in, 1, 1) as a linear layer's (out, in)."""
    if set(recipe.shape[2:]) != {1}:
        raise WeightsInvalid(f"{name}: {shown(new)} has the shape {recipe.shape}")
    shape = recipe.shape[:2]
    make = recipe.make

    def squeezed(pieces: Sequence[Tensor]) -> Tensor:
        return make(pieces).reshape(shape)

    return replace(recipe, shape=shape, make=squeezed)
