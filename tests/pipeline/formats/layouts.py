"""Headers of text encoders and autoencoders, small ones and those of the full size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from chromarpc_server.pipeline.weights.stored import Recipe, Recipes

GOLDENS = Path(__file__).parents[2] / "goldens"
FORMATS = GOLDENS / "formats"


def recipes_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Recipes:
    """Tensors that are stored as they are."""
    return {name: Recipe((name,), shape, dtype, "plain") for name, shape in shapes.items()}


def t5_shapes(
    *, width: int = 8, heads: int = 2, head: int = 4, gate: int = 16, blocks: int = 2, vocabulary: int = 10
) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names."""
    inner = heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (vocabulary, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
    }
    for block in range(blocks):
        layer = f"encoder.block.{block}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes |= {
            f"{layer}.0.SelfAttention.o.weight": (width, inner),
            f"{layer}.0.layer_norm.weight": (width,),
            f"{layer}.1.DenseReluDense.wi_0.weight": (gate, width),
            f"{layer}.1.DenseReluDense.wi_1.weight": (gate, width),
            f"{layer}.1.DenseReluDense.wo.weight": (width, gate),
            f"{layer}.1.layer_norm.weight": (width,),
        }
    return shapes


def header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
