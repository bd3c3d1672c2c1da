"""T5 v1.1's encoder, by Hugging Face's names, from each layout that people have it in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.stored import Recipe, Recipes
from chromarpc_server.pipeline.weights.tensor_file import shown, shown_few

SHARED = "shared.weight"
"""The embedding, of which there is one whatever a file calls it."""
EMBED = "encoder.embed_tokens.weight"
"""Another name of it in Hugging Face's files."""
CONSTANTS: Mapping[str, object] = MappingProxyType(
    {
        "feed_forward_proj": "gated-gelu",
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
    }
)
"""What every T5 v1.1 has in common, and no tensor shows."""

_LLAMA_CPP = {
    "token_embd.weight": SHARED,
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
_LLAMA_CPP_LAYERS = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
"""llama.cpp's names of what is in a block, and Hugging Face's."""
_DECODER = ("decoder.", "dec.", "lm_head.", "output.")
"""How the names of T5's other half begin: of Hugging Face's files, and of llama.cpp's."""
_NO_WEIGHTS = frozenset({"logit_scale", "spiece_model"})
"""What ComfyUI writes beside an encoder: a number of CLIP's, and the tokenizer."""


@dataclass(frozen=True)
class TextEncoderPart:
    """An encoder that a file holds."""

    recipes: Recipes = field(repr=False)
    """By Hugging Face's names, the embedding once, as `shared.weight`."""
    config: Mapping[str, object]
    """What transformers' `T5Config` is made of."""
    left_out: str = ""
    """What else the file holds that is not read, as the end of a sentence; empty where there is nothing."""


def text_encoder_part(recipes: Recipes, name: str, config: Mapping[str, object] | None = None) -> TextEncoderPart:
    """An encoder under Hugging Face's names, with its sizes.

    Args:
        recipes: the file's tensors, under Hugging Face's names or llama.cpp's.
        name: of the file, for messages.
        config: of a Hugging Face folder. Without one the sizes are read off the tensors: heads and buckets are
            what the relative bias has.

    Raises:
        WeightsInvalid: tensors are missing or unknown, or do not fit each other.
    """
    named: dict[str, Recipe] = {}
    decoder: list[str] = []
    for found, recipe in recipes.items():
        if found in _NO_WEIGHTS:
            continue
        if found.startswith(_DECODER):
            decoder.append(found)
            continue
        named[_hugging_face_name(found)] = recipe
    shared = named.pop(EMBED, None)
    if shared is not None:
        named.setdefault(SHARED, shared)
    sizes = _sizes(named, name)
    if config is not None:
        _require_agreement(sizes, config, name)
    _require_shapes(named, sizes, name)
    left_out = f"the decoder's {len(decoder)} tensors, which text encoding does not need" if decoder else ""
    return TextEncoderPart(named, dict(config) if config is not None else {**CONSTANTS, **sizes}, left_out)


def _hugging_face_name(name: str) -> str:
    known = _LLAMA_CPP.get(name)
    if known is not None:
        return known
    match = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match.group(2) not in _LLAMA_CPP_LAYERS:
        return name
    return f"encoder.block.{match.group(1)}.{_LLAMA_CPP_LAYERS[match.group(2)]}.weight"


def _sizes(recipes: Recipes, name: str) -> dict[str, int]:
    """T5Config's sizes, off the tensors.

    Raises:
        WeightsInvalid: one that tells them is missing, or has another number of dimensions.
    """
    first = "encoder.block.0.layer"

    def sides(tensor: str) -> tuple[int, int]:
        recipe = recipes.get(tensor)
        if recipe is None:
            raise WeightsInvalid(f"{name}: not a T5 v1.1 encoder: it has no tensor '{tensor}'")
        if len(recipe.shape) != 2 or not all(recipe.shape):
            raise WeightsInvalid(f"{name}: '{tensor}' has the shape {recipe.shape}")
        return recipe.shape[0], recipe.shape[1]

    vocabulary, width = sides(SHARED)
    buckets, heads = sides(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    inner, _ = sides(f"{first}.0.SelfAttention.q.weight")
    gate, _ = sides(f"{first}.1.DenseReluDense.wi_0.weight")
    if inner % heads:
        raise WeightsInvalid(f"{name}: {inner} channels of attention do not divide into {heads} heads")
    blocks = {int(match.group(1)) for key in recipes if (match := re.match(r"encoder\.block\.(\d{1,4})\.", key))}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": gate,
        "num_layers": 1 + max(blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _require_agreement(sizes: Mapping[str, int], config: Mapping[str, object], name: str) -> None:
    """Raises `WeightsInvalid` where a config.json says other sizes than the tensors have."""
    for key, size in sizes.items():
        if key in config and config[key] != size:
            said = shown(str(config[key]))
            raise WeightsInvalid(f"{name}: its config says {key} {said}, and its tensors have {size}")


def _require_shapes(recipes: Recipes, sizes: Mapping[str, int], name: str) -> None:
    """Raises `WeightsInvalid` for tensors that are missing, unknown, or of another shape than the sizes make."""
    width, inner, gate = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    expected: dict[str, tuple[int, ...]] = {
        SHARED: (sizes["vocab_size"], width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            sizes["relative_attention_num_buckets"],
            sizes["num_heads"],
        ),
    }
    in_block = {
        "layer.0.SelfAttention.q": (inner, width),
        "layer.0.SelfAttention.k": (inner, width),
        "layer.0.SelfAttention.v": (inner, width),
        "layer.0.SelfAttention.o": (width, inner),
        "layer.0.layer_norm": (width,),
        "layer.1.DenseReluDense.wi_0": (gate, width),
        "layer.1.DenseReluDense.wi_1": (gate, width),
        "layer.1.DenseReluDense.wo": (width, gate),
        "layer.1.layer_norm": (width,),
    }
    for block in range(min(sizes["num_layers"], len(recipes))):
        expected |= {f"encoder.block.{block}.{layer}.weight": shape for layer, shape in in_block.items()}
    missing = sorted(set(expected) - set(recipes))
    surplus = sorted(set(recipes) - set(expected))
    if missing or surplus:
        raise WeightsInvalid(
            f"{name}: {len(missing)} tensors of a T5 v1.1 encoder missing {shown_few(missing)}, "
            f"{len(surplus)} unknown {shown_few(surplus)}"
        )
    for tensor, shape in expected.items():
        if recipes[tensor].shape != shape:
            raise WeightsInvalid(f"{name}: '{tensor}' has the shape {recipes[tensor].shape}, and not {shape}")
