"""Every format's arithmetic in float64, written from its definition: no code of the server is used here.

Names are written out by hand for the tiny model, one module a line, so that a wrong rule in the server's table
of names cannot hide behind the same rule here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Parts = dict[str, Tensor]
EPSILON = float(np.finfo(np.float32).eps)

WIDTH = 64
"""Of the tiny model's residual stream; its MLPs are four times as wide."""

DIFFUSERS_ROWS: dict[str, tuple[str, tuple[int, int]]] = {
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", (0, 64)),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", (64, 128)),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", (128, 192)),
    "transformer_blocks.1.attn.add_q_proj": ("double_blocks.1.txt_attn.qkv", (0, 64)),
    "transformer_blocks.1.attn.add_k_proj": ("double_blocks.1.txt_attn.qkv", (64, 128)),
    "transformer_blocks.1.attn.add_v_proj": ("double_blocks.1.txt_attn.qkv", (128, 192)),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", (0, 64)),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", (0, 64)),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0", (0, 256)),
    "transformer_blocks.0.ff.net.2": ("double_blocks.0.img_mlp.2", (0, 64)),
    "transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0", (0, 256)),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", (0, 64)),
    "single_transformer_blocks.1.attn.to_q": ("single_blocks.1.linear1", (0, 64)),
    "single_transformer_blocks.1.attn.to_k": ("single_blocks.1.linear1", (64, 128)),
    "single_transformer_blocks.1.attn.to_v": ("single_blocks.1.linear1", (128, 192)),
    "single_transformer_blocks.1.proj_mlp": ("single_blocks.1.linear1", (192, 448)),
    "single_transformer_blocks.1.proj_out": ("single_blocks.1.linear2", (0, 64)),
    "distilled_guidance_layer.layers.0.linear_1": ("distilled_guidance_layer.layers.0.in_layer", (0, 80)),
    "distilled_guidance_layer.layers.0.linear_2": ("distilled_guidance_layer.layers.0.out_layer", (0, 80)),
    "x_embedder": ("img_in", (0, 64)),
    "context_embedder": ("txt_in", (0, 64)),
    "proj_out": ("final_layer.linear", (0, 64)),
}
"""diffusers' module → native module and the rows of its weight."""


def array(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy()


def low_rank(down: Tensor, up: Tensor, alpha: float | None = None) -> Array:
    rank = down.shape[0]
    return array(up) @ array(down) * ((rank if alpha is None else alpha) / rank)


def lokr(parts: Parts, alpha: float) -> Array:
    """`parts` as LyCORIS names them, without the prefix `lokr_`."""
    factors, rank = [], None
    for side in ("w1", "w2"):
        if side in parts:
            factors.append(array(parts[side]))
        else:
            rank = parts[f"{side}_b"].shape[0]
            factors.append(array(parts[f"{side}_a"]) @ array(parts[f"{side}_b"]))
    return np.kron(*factors) * (1.0 if rank is None else alpha / rank)


def loha(parts: Parts, alpha: float) -> Array:
    """`parts` as LyCORIS names them, without the prefix `hada_`."""
    products = [array(parts[f"{side}_a"]) @ array(parts[f"{side}_b"]) for side in ("w1", "w2")]
    return products[0] * products[1] * (alpha / parts["w1_b"].shape[0])


def dora(base: Array, difference: Array, magnitude: Tensor) -> Array:
    """The weight at multiplier 1, per output row."""
    moved = base + difference
    norm = np.sqrt((moved**2).sum(axis=1, keepdims=True))
    return moved * array(magnitude).reshape(-1, 1) / (norm + EPSILON)


def relative(found: Tensor, expected: Array) -> float:
    """‖a − b‖ / ‖b‖."""
    assert tuple(found.shape) == expected.shape
    return float(np.linalg.norm(array(found) - expected) / np.linalg.norm(expected))
