"""Whether the kernels can be trusted on this machine: compiled, run and compared with their plain form."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from chromarpc_server.pipeline.fused import plain

TOLERANCE = 0.01


@torch.inference_mode()
def check_kernels(kernels: ModuleType, device: torch.device) -> None:
    """Runs them once on little data.

    Raises:
        RuntimeError: a result differs from the plain form's. Compilers raise what they like.
    """
    for found, expected in zip(_run(kernels, device), _run(plain, device), strict=True):
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE:
            raise RuntimeError(f"a kernel is wrong by {error:.3g}")


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
    return [normed, later, x, qkv, ops.join_gelu(added, qkv[:, 768:]), ops.join_gelu(None, qkv[:, 768:])]
