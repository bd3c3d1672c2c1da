"""Float8 weights, exactly as torchao 0.10.0 computes them, whatever torchao is installed.

Later versions keep the scale in float32 and divide, which lands 2 to 3 % of the weights one e4m3 step away.
Weights only, one scale for each output row, everything in the weight's own dtype (bf16):

    scale = max(|row|) / 448, at least 2⁻²³
    q     = clamp(w · (1 / scale), ±448) → float8_e4m3fn
    w̃     = dtype(q) · scale
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
SMALLEST_SCALE = 2.0**-23


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a linear layer's weight.

    Args:
        weight: (out, in), bf16 in the reference.

    Returns:
        q (out, in) float8_e4m3fn, and scale (out,) in the weight's dtype.
    """
    largest = weight.abs().amax(dim=1)
    scale = torch.clamp(largest / FLOAT8_MAX, min=SMALLEST_SCALE)
    scaled = weight * (1.0 / scale)[:, None]
    return torch.clamp(scaled, -FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """w̃, what a linear layer multiplies by: (out, in) in the scale's dtype."""
    return q.to(scale.dtype) * scale[:, None]
