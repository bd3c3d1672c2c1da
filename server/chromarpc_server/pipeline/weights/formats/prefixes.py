"""Which of a file's tensors make up one part of a model, in files that hold one part and in those that hold all.

ComfyUI saves checkpoints whole, each part under a prefix that differs between models and years. A part is found by
a tensor that every file of it has, whatever stands before that name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.stored import Recipes

Part = Literal["transformer", "text_encoder", "autoencoder"]

_ANCHORS: Mapping[Part, tuple[str, ...]] = {
    "transformer": (
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "img_in.weight",
    ),
    "text_encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight", "enc.blk.0.attn_q.weight"),
    "autoencoder": ("decoder.conv_in.weight",),
}
"""Names that tensors of a part have, the surest first."""
_ROOTS: Mapping[Part, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer."),
    "text_encoder": ("cond_stage_model.", "text_encoders.", "conditioner."),
    "autoencoder": ("first_stage_model.", "vae."),
}
"""How names begin that belong to a part, whatever it is."""


def part_recipes(recipes: Recipes, part: Part) -> Recipes:
    """A part's tensors without their prefix. A file that holds one part only is that part, whatever is in it.

    Args:
        recipes: of a file, under its own names.
        part: which.

    Raises:
        WeightsInvalid: the file holds other parts and not this one.
    """
    prefix = part_prefix(recipes, part)
    if prefix is None:
        raise WeightsInvalid(f"holds other parts of a model, and no {part.replace('_', ' ')}")
    others = tuple(root for other, roots in _ROOTS.items() if other != part for root in roots)
    return {
        name.removeprefix(prefix): recipe
        for name, recipe in recipes.items()
        if name.startswith(prefix) and (prefix or not name.startswith(others))
    }


def part_roots(names: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of all parts that a file has, the longest first; none where it is one part."""
    every = list(names)
    found = {part_prefix(every, part) for part in _ROOTS}
    return tuple(sorted((prefix for prefix in found if prefix), key=len, reverse=True))


def part_prefix(names: Iterable[str], part: Part) -> str | None:
    """What stands before the names of a part's tensors; None where a file of several parts lacks it."""
    every = list(names)
    for anchor in _ANCHORS[part]:
        found = [name.removesuffix(anchor) for name in every if name == anchor or name.endswith(f".{anchor}")]
        if found:
            return min(found, key=len)
    for root in _ROOTS[part]:
        if any(name.startswith(root) for name in every):
            return root
    held = [other for other in _ROOTS if any(name.startswith(_ROOTS[other]) for name in every)]
    return None if held else ""
