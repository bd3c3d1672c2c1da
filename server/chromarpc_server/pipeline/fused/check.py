"""Which form of the kernels this machine gets: compiled, if they compile, run and agree with their plain form."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline.device import on_device
from chromarpc_server.pipeline.fallbacks import WrongResult, unusable
from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.memory_errors import translate_memory_error
from chromarpc_server.pipeline.models.config import ChromaConfig

log = logging.getLogger(__name__)

TOLERANCE = 0.01
_ONE_COMPILER = threading.Lock()
"""Two devices that begin at once would compile each kernel twice."""


@dataclass(frozen=True)
class _Form:
    ops: ModuleType
    fallback: DeviceFallback | None = None


def fused_ops(device: torch.device) -> ModuleType:
    """The kernels on a GPU where they compile and are right, else their plain form.

    Raises:
        RuntimeError: the device has too little memory to find out.
    """
    return _form(device).ops


def kernels_fallback(device: torch.device) -> DeviceFallback | None:
    """Why a GPU gets the plain form; raises as `fused_ops` does."""
    return _form(device).fallback


@cache
def _form(device: torch.device) -> _Form:
    if device.type != "cuda":
        return _Form(plain)
    try:
        from chromarpc_server.pipeline.fused import kernels  # noqa: PLC0415 - needs Triton

        with _ONE_COMPILER, on_device(device):
            check_kernels(kernels, device)
    except ImportError as problem:
        log.warning("kernels.unusable", extra={"device": str(device), "error": str(problem)[:300]})
        return _Form(plain, DeviceFallback(Part.KERNELS, "Triton is not installed, or cannot be imported"))
    except Exception as problem:
        if translate_memory_error(problem) is not None:
            raise  # it says nothing of the kernels: the next job finds out
        error = f"{type(problem).__name__}: {problem}"[:300]
        log.warning("kernels.unusable", extra={"device": str(device), "error": error})
        return _Form(plain, DeviceFallback(Part.KERNELS, unusable(problem)))
    return _Form(kernels)


@torch.inference_mode()
def check_kernels(kernels: ModuleType, device: torch.device) -> None:
    """Runs them once on little data.

    Raises:
        WrongResult: a result differs from the plain form's. Compilers raise what they like.
    """
    for found, expected in zip(_run(kernels, device), _run(plain, device), strict=True):
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE:
            raise WrongResult(f"a kernel's result is {error:.3g} off")


def _run(ops: ModuleType, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x, added, gate, shift, scale = draw(3, 256), draw(3, 256), draw(256), draw(256), draw(256)
    qkv, rope = draw(3, 1024), (draw(3, 64).float(), draw(3, 64).float())
    normed = ops.norm_modulate(x, shift, scale)
    later = ops.add_norm_modulate(x, added, gate, shift, scale)
    ops.gated_add(x, added, gate)
    ops.qk_norm_rope(qkv[:, :768], gate[:128], scale[:128], rope, 2)
    joined = ops.join_gelu(added, qkv[:, 768:]), ops.join_gelu(None, qkv[:, 768:])
    beside, narrow = draw(64, 256), x.new_empty(3, 64)
    ops.narrow_product(x, beside, narrow)
    return [normed, later, x, qkv, *joined, narrow]


@torch.inference_mode()
def warm_up_kernels(config: ChromaConfig, device: torch.device) -> None:
    """Compiles every kernel for a model's widths, of all profiles: what a later request needs is there then."""
    ops = fused_ops(device)
    if ops is not plain:
        with _ONE_COMPILER:
            _warm_up(ops, config, device)


def _warm_up(ops: ModuleType, config: ChromaConfig, device: torch.device) -> None:
    hidden, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=device)

    x, vector, both = zeros(1, hidden), zeros(hidden), zeros(1, 3 * hidden + inner)
    table = torch.zeros(1, config.head_dim // 2, device=device)
    for quantized in ("", "_quantized"):
        getattr(ops, f"norm_modulate{quantized}")(x, vector, vector)
        getattr(ops, f"add_norm_modulate{quantized}")(x, x.clone(), vector, vector, vector)
        for beside, mlp in ((x, both[:, 3 * hidden :]), (None, zeros(1, inner))):
            getattr(ops, f"join_gelu{quantized}")(beside, mlp)
    ops.gated_add(x, x.clone(), vector)
    ops.quantize(x)
    for rank in (64, 128):  # of adapters beside a layer
        ops.narrow_product(zeros(16, hidden), zeros(rank, hidden), zeros(16, rank))
    gain = vector[: config.head_dim]
    for qkv in (both, zeros(1, 3 * hidden)):
        ops.qk_norm_rope(qkv, gain, gain, (table, table), config.num_heads)
