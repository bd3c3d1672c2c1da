"""Triton kernels over weights: quantizing and dequantizing them, and products with few output columns.

As in `kernels`, where they are called: whole rows, values read in their dtype and computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chromarpc_server.pipeline.fused.launching import on_device_of_tensors
from chromarpc_server.pipeline.weights.quantization import FLOAT8_MAX, SMALLEST_SCALE

SHORT_ROW, NARROW_TILE, NARROW_STEP = 4096, 64, 128
NARROW_RANKS = (64, 128)


@triton.jit
def _round_weight_kernel(
    weight,
    q,
    scale,
    dequantized,
    width: tl.constexpr,
    block: tl.constexpr,
    smallest: tl.constexpr,
    keeps_q: tl.constexpr,
):
    # The roundings to bf16 are the reference's (see `quantization`); products of bf16 values are exact in float32.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    value = tl.load(weight + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=0)
    step = tl.maximum(tl.div_rn(largest, 448.0).to(tl.bfloat16).to(tl.float32), smallest)
    inverse = tl.div_rn(1.0, step).to(tl.bfloat16).to(tl.float32)
    scaled = (value * inverse).to(tl.bfloat16).to(tl.float32)
    small = tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)
    if keeps_q:
        tl.store(q + row * width + columns, small, mask=inside)
        tl.store(scale + row, step.to(tl.bfloat16))
    else:
        tl.store(dequantized + row * width + columns, (small.to(tl.float32) * step).to(tl.bfloat16), mask=inside)


@triton.jit
def _dequantize_kernel(q, scale, y, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(scale + row).to(tl.float32)
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        inside = columns < width
        value = tl.load(q + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * width + columns, (value * step).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _narrow_product_kernel(
    x,
    x_stride,
    weight,
    y,
    y_stride,
    rows,
    width: tl.constexpr,
    rank: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = (row < rows)[:, None]
    columns = tl.arange(0, step)
    ranks = tl.arange(0, rank)
    left = x + row.to(tl.int64)[:, None] * x_stride + columns[None, :]
    right = weight + ranks[None, :] * width + columns[:, None]
    total = tl.zeros((tile, rank), tl.float32)
    for _ in range(0, width, step):
        total = tl.dot(tl.load(left, mask=inside, other=0.0), tl.load(right), total)
        left += step
        right += step
    place = y + row.to(tl.int64)[:, None] * y_stride + ranks[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


@on_device_of_tensors
def dequantize(q: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """See `plain.dequantize`."""
    rows, width = q.shape
    _dequantize_kernel[(rows,)](q, scale, out, width, min(4096, _block(width)), num_warps=4)
    return out


@on_device_of_tensors
def round_weight(weight: Tensor, out: Tensor) -> None:
    """Writes w̃ of a bf16 weight (out, in) to `out`: `quantize_rows`, then `dequantize_rows`, bit for bit."""
    rows, width = weight.shape
    _round_weight_kernel[(rows,)](
        weight, weight, weight, out, width, _block(width), SMALLEST_SCALE, False, num_warps=8
    )


@on_device_of_tensors
def quantize_weight(weight: Tensor, q: Tensor, scale: Tensor) -> None:
    """Writes `quantize_rows` of a bf16 weight (out, in) to `q` and `scale`, bit for bit."""
    rows, width = weight.shape
    _round_weight_kernel[(rows,)](weight, q, scale, q, width, _block(width), SMALLEST_SCALE, True, num_warps=8)


@on_device_of_tensors
def narrow_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See `plain.narrow_product`. It reads short rows about as fast as memory gives them; cuBLAS does not."""
    rows, width = x.shape
    rank = weight.shape[0]
    is_short = width <= SHORT_ROW and width % NARROW_STEP == 0 and rank in NARROW_RANKS
    if not is_short or x.dtype != torch.bfloat16:
        torch.mm(x, weight.t(), out=out)
        return
    _narrow_product_kernel[(triton.cdiv(rows, NARROW_TILE),)](
        x, x.stride(0), weight, out, out.stride(0), rows, width, rank, NARROW_TILE, NARROW_STEP,
        num_warps=4, num_stages=4,
    )  # fmt: skip


assert FLOAT8_MAX == 448.0  # noqa: S101 - written out in the kernels
