"""Triton kernels of the fused forward: what is left of a block between its matrix products, in one pass each.

Values are read in their dtype, computed in float32 and rounded once. Every kernel handles whole rows, one program
a row, so that a result never depends on how many rows there are. Signatures and meaning are those of `plain`,
which tests compare them with; sizes that vary between requests are never compiled in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chromarpc_server.pipeline.fused import decoder_kernels, weight_kernels
from chromarpc_server.pipeline.fused.launching import on_device_of_tensors
from chromarpc_server.pipeline.models.layers import NORM_EPS
from chromarpc_server.pipeline.weights.quantization import FLOAT8, FLOAT8_MAX

LEAST_ROWS = 64
"""Of a float8 product. cuBLAS of CUDA 13.0 has no way to multiply fewer than about 48 rows, such as a short
prompt's, by weights of 12,288 columns and more.
"""
SMALLEST_AMAX = 1e-12

group_norm = decoder_kernels.group_norm
add_residual = decoder_kernels.add_residual
double_size = decoder_kernels.double_size
dequantize = weight_kernels.dequantize
round_weight = weight_kernels.round_weight
quantize_weight = weight_kernels.quantize_weight
narrow_product = weight_kernels.narrow_product


@triton.jit
def _normalised(x, columns, inside, shift, scale, eps: tl.constexpr, width: tl.constexpr):
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normed = centred * tl.rsqrt(variance + eps)
    gain = 1.0 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    return normed * gain + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_quantized(y, row, columns, inside, q, q_scale, width: tl.constexpr, smallest: tl.constexpr):
    amax = tl.maximum(tl.max(tl.abs(y), axis=0), smallest)
    step = amax / 448.0
    tl.store(q_scale + row, step)
    tl.store(q + row * width + columns, (y / step).to(tl.float8e4nv), mask=inside)


@triton.jit
def _norm_modulate_kernel(
    x,
    added,
    gate,
    shift,
    scale,
    y,
    y_scale,
    y_stride,
    eps: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    adds: tl.constexpr,
    quantizes: tl.constexpr,
    smallest: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    place = row * width + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if adds:
        gained = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
        value += gained * tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    out = _normalised(value, columns, inside, shift, scale, eps, width)
    if quantizes:
        _store_quantized(out, row, columns, inside, y, y_scale, width, smallest)
    else:
        tl.store(y + row * y_stride + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_add_kernel(x, added, gate, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    place = row * width + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gained = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
    value += gained * tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_rope_kernel(
    qkv,
    row_stride,
    q_scale,
    k_scale,
    cos,
    sin,
    eps: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_heads: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = head_dim // 2
    pairs = tl.arange(0, half)
    channels = tl.arange(0, head_dim)
    cosine = tl.load(cos + row * half + pairs)[None, :]
    sine = tl.load(sin + row * half + pairs)[None, :]
    for part in tl.static_range(2):
        gain = tl.load((k_scale if part else q_scale) + channels).to(tl.float32)
        for first in range(0, heads, block_heads):
            head = first + tl.arange(0, block_heads)
            place = row * row_stride + (part * heads + head[:, None]) * head_dim + channels[None, :]
            inside = (head < heads)[:, None]
            x = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
            power = tl.sum(x * x, axis=1) / head_dim
            x = x * tl.rsqrt(power + eps)[:, None] * gain[None, :]
            even, odd = tl.split(tl.reshape(x, (block_heads, half, 2)))
            turned = tl.join(cosine * even - sine * odd, sine * even + cosine * odd)
            turned = tl.reshape(turned, (block_heads, head_dim))
            tl.store(qkv + place, turned.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x):
    # tanh form: 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3)
    twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-twice))


@triton.jit
def _join_gelu_kernel(
    attention,
    mlp,
    mlp_stride,
    y,
    y_scale,
    y_stride,
    attention_width: tl.constexpr,
    mlp_width: tl.constexpr,
    block_attention: tl.constexpr,
    block_mlp: tl.constexpr,
    quantizes: tl.constexpr,
    smallest: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block_mlp)
    inside = columns < mlp_width
    value = _gelu(tl.load(mlp + row * mlp_stride + columns, mask=inside, other=0.0).to(tl.float32))
    start = y + row * y_stride
    if quantizes:
        largest = tl.max(tl.abs(value), axis=0)
        if attention_width > 0:
            beside = tl.arange(0, block_attention)
            within = beside < attention_width
            joined = tl.load(attention + row * attention_width + beside, mask=within, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(joined), axis=0))
            step = tl.maximum(largest, smallest) / 448.0
            tl.store(start + beside, (joined / step).to(tl.float8e4nv), mask=within)
        step = tl.maximum(largest, smallest) / 448.0
        tl.store(y_scale + row, step)
        tl.store(start + attention_width + columns, (value / step).to(tl.float8e4nv), mask=inside)
    else:
        if attention_width > 0:
            beside = tl.arange(0, block_attention)
            within = beside < attention_width
            joined = tl.load(attention + row * attention_width + beside, mask=within, other=0.0)
            tl.store(start + beside, joined.to(y.dtype.element_ty), mask=within)
        tl.store(start + attention_width + columns, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(x, y, y_scale, width: tl.constexpr, block: tl.constexpr, smallest: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(value, row, columns, inside, y, y_scale, width, smallest)


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


@on_device_of_tensors
def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, room: int = 0) -> Tensor:
    """See `plain.norm_modulate`."""
    rows, width = x.shape
    y = x.new_empty(rows, width + room)
    _norm_modulate_kernel[(rows,)](
        x,
        x,
        x,
        shift,
        scale,
        y,
        y,
        width + room,
        NORM_EPS,
        width,
        _block(width),
        False,
        False,
        SMALLEST_AMAX,
        num_warps=4,
    )
    return y


@on_device_of_tensors
def norm_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.norm_modulate_quantized`."""
    rows, width = x.shape
    y, y_scale = _quantized_like(rows, width, x.device)
    _norm_modulate_kernel[(rows,)](
        x, x, x, shift, scale, y, y_scale, width, NORM_EPS, width, _block(width), False, True, SMALLEST_AMAX,
        num_warps=4,
    )  # fmt: skip
    return y, y_scale


@on_device_of_tensors
def add_norm_modulate(
    x: Tensor, added: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, room: int = 0
) -> Tensor:
    """See `plain.add_norm_modulate`."""
    rows, width = x.shape
    y = x.new_empty(rows, width + room)
    _norm_modulate_kernel[(rows,)](
        x, added, gate, shift, scale, y, y, width + room, NORM_EPS, width, _block(width), True, False,
        SMALLEST_AMAX, num_warps=4,
    )  # fmt: skip
    return y


@on_device_of_tensors
def add_norm_modulate_quantized(
    x: Tensor, added: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `plain.add_norm_modulate_quantized`."""
    rows, width = x.shape
    y, y_scale = _quantized_like(rows, width, x.device)
    _norm_modulate_kernel[(rows,)](
        x, added, gate, shift, scale, y, y_scale, width, NORM_EPS, width, _block(width), True, True,
        SMALLEST_AMAX, num_warps=4,
    )  # fmt: skip
    return y, y_scale


@on_device_of_tensors
def gated_add(x: Tensor, added: Tensor, gate: Tensor) -> None:
    """See `plain.gated_add`."""
    rows, width = x.shape
    _gated_add_kernel[(rows,)](x, added, gate, width, _block(width), num_warps=4)


@on_device_of_tensors
def qk_norm_rope(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> None:
    """See `plain.qk_norm_rope`."""
    head_dim = q_scale.shape[0]
    _qk_norm_rope_kernel[(qkv.shape[0],)](
        qkv, qkv.stride(0), q_scale, k_scale, *rope, NORM_EPS, heads, head_dim, min(8, _block(heads)), num_warps=4
    )


@on_device_of_tensors
def join_gelu(attention: Tensor | None, mlp: Tensor, room: int = 0) -> Tensor:
    """See `plain.join_gelu`."""
    rows, inner = mlp.shape
    width = attention.shape[1] if attention is not None else 0
    y = mlp.new_empty(rows, width + inner + room)
    _join_gelu_kernel[(rows,)](
        attention if attention is not None else mlp, mlp, mlp.stride(0), y, y, width + inner + room,
        width, inner, _block(max(width, 1)), _block(inner), False, SMALLEST_AMAX, num_warps=8,
    )  # fmt: skip
    return y


@on_device_of_tensors
def join_gelu_quantized(attention: Tensor | None, mlp: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.join_gelu_quantized`."""
    rows, inner = mlp.shape
    width = attention.shape[1] if attention is not None else 0
    y, y_scale = _quantized_like(rows, width + inner, mlp.device)
    _join_gelu_kernel[(rows,)](
        attention if attention is not None else mlp, mlp, mlp.stride(0), y, y_scale, width + inner,
        width, inner, _block(max(width, 1)), _block(inner), True, SMALLEST_AMAX, num_warps=8,
    )  # fmt: skip
    return y, y_scale


@on_device_of_tensors
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.quantize`."""
    rows, width = x.shape
    y, y_scale = _quantized_like(rows, width, x.device)
    _quantize_kernel[(rows,)](x, y, y_scale, width, _block(width), SMALLEST_AMAX, num_warps=4)
    return y, y_scale


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `plain.gelu_product`; the GELU is taken on the product's accumulators."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor | None
) -> Tensor:
    """See `plain.scaled_product`."""
    rows = x.shape[0]
    if rows < LEAST_ROWS:
        return _few_rows_product(x, x_scale, weight, weight_scale, bias, out)
    if out is None:
        out = torch.empty(rows, weight.shape[0], dtype=bias.dtype, device=x.device)
    is_wide = bias.dtype == torch.float32  # for which the library adds no bias
    added = None if is_wide else bias
    product = torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale[None], bias=added, out_dtype=bias.dtype, use_fast_accum=True, out=out
    )
    return product.add_(bias) if is_wide else product


def _few_rows_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor | None
) -> Tensor:
    """The same with rows of zeros below, which are cut off again."""
    rows, width = x.shape
    values = torch.zeros(LEAST_ROWS, width, dtype=torch.uint8, device=x.device)  # zeros in float8, too
    values[:rows] = x.view(torch.uint8)
    scales = torch.ones(LEAST_ROWS, 1, dtype=x_scale.dtype, device=x.device)
    scales[:rows] = x_scale
    product = scaled_product(values.view(x.dtype), scales, weight, weight_scale, bias, None)[:rows]
    return product.contiguous() if out is None else out.copy_(product)


def _quantized_like(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows, width, dtype=FLOAT8, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )


assert FLOAT8_MAX == 448.0  # noqa: S101 - written out in the kernels
