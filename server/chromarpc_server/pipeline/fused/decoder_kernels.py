"""Triton kernels of the fused autoencoder: what lies between its convolutions.

Activations are (1, C, H, W) with channels innermost in memory. Values are read in their dtype, computed in float32
and rounded once. Signatures and meaning are those of `plain`. An image's size is never compiled in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chromarpc_server.pipeline.fused.launching import on_device_of_tensors

STATISTICS_PROGRAMS = 1056
"""Partial sums of a normalisation: eight for each of a large GPU's multiprocessors."""
PIXELS_AT_ONCE = 4096
"""Values that a program of the statistics holds."""
FLAT_BLOCK = 4096


@triton.jit(do_not_specialize=["pixels", "share"])
def _channel_sums_kernel(
    x, bias, sums, pixels, share, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr
):
    # Sums and sums of squares of each channel over this program's share of the pixels.
    program = tl.program_id(0)
    columns = tl.arange(0, block)
    within = columns < channels
    added = tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for first in range(0, share, rows):
        pixel = first + tl.arange(0, rows)
        place = program.to(tl.int64) * share + pixel
        inside = ((place < pixels) & (pixel < share))[:, None] & within[None, :]
        value = tl.load(x + place[:, None] * channels + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value + added, 0.0)
        total += tl.sum(value, axis=0)
        squares += tl.sum(value * value, axis=0)
    tl.store(sums + (2 * program) * channels + columns, total, mask=within)
    tl.store(sums + (2 * program + 1) * channels + columns, squares, mask=within)


@triton.jit(do_not_specialize=["programs", "pixels"])
def _group_scale_kernel(
    sums,
    programs,
    pixels,
    bias,
    weight,
    shift,
    gain,
    offset,
    eps: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    # One program a group: its mean and deviation, and from them y = gain · x + offset for each of its channels.
    member = tl.arange(0, block)
    within = member < size
    columns = tl.program_id(0) * size + member
    total = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for first in range(0, programs, rows):
        part = first + tl.arange(0, rows)
        inside = (part < programs)[:, None] & within[None, :]
        place = (2 * part[:, None]) * channels + columns[None, :]
        total += tl.sum(tl.load(sums + place, mask=inside, other=0.0), axis=0)
        squares += tl.sum(tl.load(sums + place + channels, mask=inside, other=0.0), axis=0)
    count = pixels.to(tl.float32) * size
    mean = tl.sum(total, axis=0) / count
    variance = tl.maximum(tl.sum(squares, axis=0) / count - mean * mean, 0.0)
    scale = tl.rsqrt(variance + eps) * tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    added = tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(gain + columns, scale, mask=within)
    moved = tl.load(shift + columns, mask=within, other=0.0).to(tl.float32) + (added - mean) * scale
    tl.store(offset + columns, moved, mask=within)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(x, gain, offset, y, count, channels: tl.constexpr, activates: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    channel = (place % channels).to(tl.int32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(gain + channel) + tl.load(offset + channel)
    if activates:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _add_kernel(x, y, bias, count, channels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    added = tl.load(bias + (place % channels).to(tl.int32)).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + added
    value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def _double_kernel(x, y, width, channels: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < 2 * width * channels
    column = place // channels
    source = (column // 2) * channels + place % channels
    value = tl.load(x + (row // 2) * width * channels + source, mask=inside)
    tl.store(y + row * (2 * width * channels) + place, value, mask=inside)


@on_device_of_tensors
def group_norm(
    x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, groups: int, eps: float, *, activates: bool
) -> Tensor:
    """See `plain.group_norm`."""
    _, channels, height, width = x.shape
    pixels, block = height * width, triton.next_power_of_2(channels)
    rows = max(1, PIXELS_AT_ONCE // block)
    share = triton.cdiv(triton.cdiv(pixels, STATISTICS_PROGRAMS), rows) * rows
    programs = triton.cdiv(pixels, share)
    if bias is None:
        bias = torch.zeros_like(weight)
    sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    gain, offset = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)
    _channel_sums_kernel[(programs,)](x, bias, sums, pixels, share, channels, block, rows, num_warps=4)
    size = channels // groups
    _group_scale_kernel[(groups,)](
        sums, programs, pixels, bias, weight, shift, gain, offset, eps, channels, size,
        triton.next_power_of_2(size), 128, num_warps=4,
    )  # fmt: skip
    flat = (triton.cdiv(x.numel(), FLAT_BLOCK),)
    _scale_kernel[flat](x, gain, offset, y, x.numel(), channels, activates, FLAT_BLOCK, num_warps=8)
    return y


@on_device_of_tensors
def add_residual(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """See `plain.add_residual`."""
    flat = (triton.cdiv(y.numel(), FLAT_BLOCK),)
    _add_kernel[flat](x, y, bias, y.numel(), y.shape[1], FLAT_BLOCK, num_warps=8)
    return y


@on_device_of_tensors
def double_size(x: Tensor) -> Tensor:
    """See `plain.double_size`."""
    _, channels, height, width = x.shape
    y = torch.empty(
        (1, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    grid = (2 * height, triton.cdiv(2 * width * channels, FLAT_BLOCK))
    _double_kernel[grid](x, y, width, channels, FLAT_BLOCK, num_warps=8)
    return y
