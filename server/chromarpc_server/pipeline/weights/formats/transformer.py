"""The transformer's tensors under their native names, whichever names a file has for them.

diffusers renames everything and keeps query, key, value and MLP apart, which are one product natively.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.formats.codes import joined
from chromarpc_server.pipeline.weights.stored import Recipe, Recipes
from chromarpc_server.pipeline.weights.tensor_file import shown_few

CONFIG = "config"
"""The header's key under which a file notes sizes that its tensors do not show."""

_DIFFUSERS_MARKS = ("x_embedder.weight", "context_embedder.weight")
_RENAMED = {
    "x_embedder.*": "img_in.*",
    "context_embedder.*": "txt_in.*",
    "proj_out.*": "final_layer.linear.*",
    "distilled_guidance_layer.in_proj.*": "distilled_guidance_layer.in_proj.*",
    "distilled_guidance_layer.out_proj.*": "distilled_guidance_layer.out_proj.*",
    "distilled_guidance_layer.layers.N.linear_1.*": "distilled_guidance_layer.layers.N.in_layer.*",
    "distilled_guidance_layer.layers.N.linear_2.*": "distilled_guidance_layer.layers.N.out_layer.*",
    "distilled_guidance_layer.norms.N.weight": "distilled_guidance_layer.norms.N.scale",
    "transformer_blocks.N.attn.norm_q.weight": "double_blocks.N.img_attn.norm.query_norm.scale",
    "transformer_blocks.N.attn.norm_k.weight": "double_blocks.N.img_attn.norm.key_norm.scale",
    "transformer_blocks.N.attn.norm_added_q.weight": "double_blocks.N.txt_attn.norm.query_norm.scale",
    "transformer_blocks.N.attn.norm_added_k.weight": "double_blocks.N.txt_attn.norm.key_norm.scale",
    "transformer_blocks.N.attn.to_out.0.*": "double_blocks.N.img_attn.proj.*",
    "transformer_blocks.N.attn.to_add_out.*": "double_blocks.N.txt_attn.proj.*",
    "transformer_blocks.N.ff.net.0.proj.*": "double_blocks.N.img_mlp.0.*",
    "transformer_blocks.N.ff.net.2.*": "double_blocks.N.img_mlp.2.*",
    "transformer_blocks.N.ff_context.net.0.proj.*": "double_blocks.N.txt_mlp.0.*",
    "transformer_blocks.N.ff_context.net.2.*": "double_blocks.N.txt_mlp.2.*",
    "single_transformer_blocks.N.attn.norm_q.weight": "single_blocks.N.norm.query_norm.scale",
    "single_transformer_blocks.N.attn.norm_k.weight": "single_blocks.N.norm.key_norm.scale",
    "single_transformer_blocks.N.proj_out.*": "single_blocks.N.linear2.*",
}
"""diffusers' names to the native ones; `N` is a block's number, `*` is `weight` or `bias`."""
_JOINED = {
    "transformer_blocks.N.attn.to_q.*": (("to_q", "to_k", "to_v"), "double_blocks.N.img_attn.qkv.*"),
    "transformer_blocks.N.attn.add_q_proj.*": (
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.N.txt_attn.qkv.*",
    ),
    "single_transformer_blocks.N.attn.to_q.*": (
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.N.linear1.*",
    ),
}
"""Tensors that are one natively: the first one's name; what stands there in each of their names, and the native
name."""


def transformer_recipes(recipes: Recipes) -> Recipes:
    """A transformer's tensors under native names.

    Args:
        recipes: under the names of its file, without a prefix.

    Raises:
        WeightsInvalid: some of what native ones are joined of is missing, or does not go together.
    """
    if not any(mark in recipes for mark in _DIFFUSERS_MARKS):
        return recipes
    taken: set[str] = set()
    found: dict[str, Recipe] = {}
    for names, native in _native(recipes):
        parts = [recipes[name] for name in names if name in recipes]
        if len(parts) < len(names):
            missing = [name for name in names if name not in recipes]
            raise WeightsInvalid(f"{len(missing)} tensors missing {shown_few(missing)}")
        found[native] = parts[0] if len(parts) == 1 else joined(parts)
        taken.update(names)
    # What has no native name keeps its own, so that it is not overlooked.
    found.update((name, recipe) for name, recipe in recipes.items() if name not in taken)
    return found


def _native(names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of a file's tensors that make one native tensor, and its name."""
    for name in names:
        pattern, number, leaf = _pattern(name)
        if pattern in _RENAMED:
            yield (name,), _named(_RENAMED[pattern], number, leaf)
        elif pattern in _JOINED:
            parts, native = _JOINED[pattern]
            yield tuple(name.replace(parts[0], part) for part in parts), _named(native, number, leaf)


def _pattern(name: str) -> tuple[str, str, str]:
    """A name with its block's number and its last word taken out; the name itself where that is no pattern."""
    number = re.search(r"(?<=\.)[0-9]+(?=\.)", name)
    pattern = name if number is None else f"{name[: number.start()]}N{name[number.end() :]}"
    stem, _, leaf = pattern.rpartition(".")
    starred = f"{stem}.*"
    if leaf in ("weight", "bias") and (starred in _RENAMED or starred in _JOINED):
        pattern = starred
    return pattern, number[0] if number else "", leaf


def _named(pattern: str, number: str, leaf: str) -> str:
    return pattern.replace("N", number).replace("*", leaf)


def config_text(metadata: Mapping[str, str], folder_config: Mapping[str, Any] | None) -> str | None:
    """What a file's header or a diffusers folder's config.json says of sizes, as a native header holds it.

    None where neither says anything.
    """
    if CONFIG in metadata:
        return metadata[CONFIG]
    axes = None if folder_config is None else folder_config.get("axes_dims_rope")
    return None if axes is None else json.dumps({"axes_dim": axes})
