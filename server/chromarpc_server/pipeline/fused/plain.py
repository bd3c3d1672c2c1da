"""What the kernels compute, in plain torch: the fused forward on a CPU, and what tests compare the kernels with.

Shapes: R rows (tokens of all sequences together), C hidden size, H heads, D head size. Inputs have the model's
dtype; everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chromarpc_server.pipeline.models.layers import NORM_EPS
from chromarpc_server.pipeline.precision import float32_products
from chromarpc_server.pipeline.weights.quantization import FLOAT8, FLOAT8_MAX

SMALLEST_AMAX = 1e-12


def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift.float(), normed, 1 + scale.float())


def _widened(x: Tensor, room: int) -> Tensor:
    return x if room == 0 else torch.cat((x, x.new_empty(x.shape[0], room)), dim=1)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, room: int = 0) -> Tensor:
    """(1 + scale) · LN(x) + shift, with `room` columns beside it that hold nothing yet.

    x (R, C), shift and scale (C,) → (R, C + room) in x's dtype.
    """
    return _widened(_norm_modulate(x, shift, scale).to(x.dtype), room)


def norm_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same, quantized as `quantize` does."""
    return quantize(_norm_modulate(x, shift, scale))


def add_norm_modulate(
    x: Tensor, added: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, room: int = 0
) -> Tensor:
    """Adds gate · added to x in place, then `norm_modulate` of it.

    x, added (R, C), the others (C,) → (R, C + room).
    """
    gated_add(x, added, gate)
    return norm_modulate(x, shift, scale, room)


def add_norm_modulate_quantized(
    x: Tensor, added: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, quantized as `quantize` does."""
    gated_add(x, added, gate)
    return norm_modulate_quantized(x, shift, scale)


def gated_add(x: Tensor, added: Tensor, gate: Tensor) -> None:
    """X + gate · added, in place. x and added (R, C), gate (C,)."""
    x.copy_(torch.addcmul(x.float(), added.float(), gate.float()))


def qk_norm_rope(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> None:
    """RMS-normalises every head of q and k and rotates adjacent channel pairs, in place; v stays.

    Args:
        qkv: (R, 3 · H · D), rows may be strided.
        q_scale: (D,).
        k_scale: (D,).
        rope: cosines and sines (R, D/2) float32.
        heads: H.
    """
    cos, sin = (table[:, None, None] for table in rope)
    both = qkv[:, : 2 * heads * q_scale.shape[0]].unflatten(1, (2, heads, -1))
    gains = torch.stack((q_scale, k_scale)).float()[None, :, None]
    normed = F.rms_norm(both.float(), q_scale.shape, eps=NORM_EPS) * gains
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    both.copy_(torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2))


def _join_gelu(attention: Tensor | None, mlp: Tensor) -> Tensor:
    activated = F.gelu(mlp.float(), approximate="tanh")
    return activated if attention is None else torch.cat((attention.float(), activated), dim=1)


def join_gelu(attention: Tensor | None, mlp: Tensor, room: int = 0) -> Tensor:
    """Attention (R, C) beside the tanh-GELU of mlp (R, I), whose rows may be strided → (R, C + I + room)."""
    return _widened(_join_gelu(attention, mlp).to(mlp.dtype), room)


def join_gelu_quantized(attention: Tensor | None, mlp: Tensor) -> tuple[Tensor, Tensor]:
    """The same, quantized as `quantize` does."""
    return quantize(_join_gelu(attention, mlp))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 with one scale a row, largest value on 448. x (R, C) → (R, C) float8_e4m3fn, (R, 1) float32."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX) / FLOAT8_MAX
    return (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def dequantize(q: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """w̃ = q · scale into `out`. q (out, in) float8, scale (out,) → (out, in) in `out`'s dtype."""
    return torch.mul(q.to(scale.dtype), scale[:, None], out=out)


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of x · weightᵀ + bias. x (R, in), weight (out, in), bias (out,) → (R, out)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def narrow_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """X · weightᵀ into `out`. x (R, in), weight (rank, in), out (R, rank); rows of x and out may be strided."""
    torch.mm(x, weight.t(), out=out)


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor | None
) -> Tensor:
    """X · weightᵀ of float8 operands, scaled back, plus bias.

    Args:
        x: (R, in) float8.
        x_scale: (R, 1) float32.
        weight: (out, in) float8.
        weight_scale: (out,) float32.
        bias: (out,) in the dtype of the result.
        out: where to put it, (R, out), if given.
    """
    with float32_products(x.device):
        product = F.linear(x.float() * x_scale, weight.float() * weight_scale[:, None].float()) + bias.float()
    return product.to(bias.dtype) if out is None else out.copy_(product)


def group_norm(
    x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, groups: int, eps: float, *, activates: bool
) -> Tensor:
    """Normalises groups of channels of x + bias, and takes SiLU of the result where it `activates`.

    Args:
        x: (1, C, H, W), channels innermost in memory.
        bias: (C,), or none.
        weight: (C,).
        shift: (C,).
        groups: what C is divided into.
        eps: added to the variance.
        activates: whether SiLU follows.

    Returns:
        Like x.
    """
    wide = x.float() if bias is None else x.float() + bias.float()[:, None, None]
    normed = F.group_norm(wide, groups, weight.float(), shift.float(), eps)
    return (F.silu(normed) if activates else normed).to(x.dtype).contiguous(memory_format=torch.channels_last)


def add_residual(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """X + y + bias, in y. x and y (1, C, H, W), bias (C,)."""
    return y.copy_(x.float() + y.float() + bias.float()[:, None, None])


def double_size(x: Tensor) -> Tensor:
    """Every pixel four times. (1, C, H, W) → (1, C, 2 · H, 2 · W), channels innermost in memory."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest").contiguous(memory_format=torch.channels_last)
