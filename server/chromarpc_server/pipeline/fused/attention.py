"""Attention over packed sequences: the fastest kernel that this machine has and that gives the right answer.

FlashAttention-3 (the `[fa3]` extra, Hopper GPUs) takes the boundaries of sequences as a tensor: no length is
special to it. torch's own takes one call for each sequence; on a GPU that is cuDNN's, which plans each length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline.fallbacks import WrongResult, unusable
from chromarpc_server.pipeline.memory_errors import translate_memory_error

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Relative error against float32 beyond which a kernel is not trusted; bf16 itself gives 0.004."""


@dataclass(frozen=True)
class Spans:
    """Which rows of a buffer belong together; rows outside are left alone."""

    bounds: tuple[int, ...]
    """Rows where the sequences begin, one after another, and where the last one ends."""
    starts: Tensor
    """The same, int32, on the device."""
    longest: int
    """Rows of the longest sequence that the buffer can hold."""


Kernel = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]
"""q, k, v (R, H, D), strided, and the sequences → (R, H, D); rows outside hold anything."""


@dataclass(frozen=True)
class Attention:
    """A kernel and what is known of it."""

    name: str
    kernel: Kernel
    any_length: bool
    """Whether boundaries are read from `Spans.starts`, so that a recorded graph serves every length."""
    fallback: DeviceFallback | None = None
    """Why it is not a faster one, where that is installed."""

    def __call__(self, qkv: Tensor, heads: int, spans: Spans) -> Tensor:
        """(R, 3 · H · D) → (R, H · D)."""
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
        return self.kernel(q, k, v, spans).flatten(1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin, end in zip(spans.bounds[:-1], spans.bounds[1:], strict=True):
        one_q, one_k, one_v = (part[begin:end].transpose(0, 1)[None] for part in (q, k, v))
        if _fits_cudnn(one_q, one_k, one_v):
            # By name: which kernels torch prefers is one setting for all threads, on which `exact` relies.
            attended = torch.ops.aten._scaled_dot_product_cudnn_attention(
                one_q, one_k, one_v, attn_bias=None, compute_log_sumexp=False
            )[0]
        else:
            attended = F.scaled_dot_product_attention(one_q, one_k, one_v)
        out[begin:end] = attended[0].transpose(0, 1)
    return out


def _fits_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's kernel, the fastest that torch has, takes these."""
    return q.is_cuda and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, False, False))


SDPA = Attention("torch", _sdpa, any_length=False)


def _flash3() -> Kernel:
    try:
        from fa3_fwd_interface import flash_attn_varlen_func  # type: ignore[import-not-found]  # noqa: PLC0415
    except ModuleNotFoundError:
        from flash_attn_interface import (  # type: ignore[import-not-found]  # noqa: PLC0415
            flash_attn_varlen_func,
        )

    def kernel(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        starts, longest = spans.starts, spans.longest
        with torch.cuda.device_of(q):
            out = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return kernel


@cache
def select_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """FlashAttention-3 where it is installed, runs and agrees with plain attention; else torch's own.

    Raises:
        RuntimeError: the device has too little memory to find out.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] != 9:
        return SDPA
    try:
        attention = Attention("flash-attention-3", _flash3(), any_length=True)
        error = _error(attention, device, dtype, head_dim)
        if not error <= TOLERANCE:
            raise WrongResult(f"its result is {error:.3g} off")  # noqa: TRY301 - one way out for all that is wrong
    except ModuleNotFoundError:
        return SDPA  # an extra that nobody installed is not missed
    except Exception as problem:
        if translate_memory_error(problem) is not None:
            raise  # it says nothing of the kernel: the next job finds out
        log.warning(
            "attention.wrong" if isinstance(problem, WrongResult) else "attention.unusable",
            extra={"kernel": "flash-attention-3", "error": str(problem)[:300]},
        )
        return replace(SDPA, fallback=DeviceFallback(Part.ATTENTION, unusable(problem)))
    return attention


@torch.inference_mode()
def _error(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Relative error on two short sequences that begin in the middle of a strided buffer."""
    heads, bounds = 3, (5, 205, 300)
    generator = torch.Generator(device).manual_seed(1)
    qkv = torch.randn(bounds[-1], 4 * heads * head_dim, generator=generator, device=device).to(dtype)
    spans = Spans(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), 256)
    found = attention(qkv[:, : 3 * heads * head_dim], heads, spans)[bounds[0] :].float()
    cpu = Spans(bounds, spans.starts.cpu(), spans.longest)
    expected = SDPA(qkv[:, : 3 * heads * head_dim].float().cpu(), heads, cpu)[bounds[0] :].to(device)
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN
