"""Numerics profiles: how the same function is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from chromarpc_server.domain.models import MemoryPlan


@dataclass(frozen=True)
class NumericsProfile:
    """How the same function is computed."""

    name: str
    description: str
    fused: bool
    """Computed by `fused.forward`, over unmasked packed sequences and with all steps' modulations made before;
    else by `transformer` step by step as the reference does, text padded to 512 tokens and masked."""
    float8_products: bool = False
    """The blocks' linears multiply float8 by float8."""
    trainer: bool = False
    """Computes what ai-toolkit computes when it draws samples, by the request's trainer settings; else what the
    reference computes."""

    @property
    def needs_float8_weights(self) -> bool:
        """Whether weights must be held in float8, instead of dequantized where there is room."""
        return self.float8_products or not (self.fused or self.trainer)

    def must_round(self, memory: MemoryPlan | None) -> bool:
        """Whether weights are rounded whatever a request says: the profile does, or nothing else has room.

        `memory`: what of the checkpoint lies where; None on a CPU.
        """
        holds_float8 = memory is not None and memory.weights == "float8"
        return holds_float8 or self.needs_float8_weights or self.trainer


EXACT = NumericsProfile(
    name="exact",
    description="the reference's own sequence of operations, bit-identical on the same GPU and torch",
    fused=False,
)

REFERENCE = NumericsProfile(
    name="reference",
    description="the same function without the waste; as close to the truth as the reference itself",
    fused=True,
)

FP8 = NumericsProfile(
    name="fp8",
    description="the blocks' linears multiply in float8, activations rounded too: faster and less exact",
    fused=True,
    float8_products=True,
)

PREVIEW = NumericsProfile(
    name="preview",
    description="what ai-toolkit draws during training, adapters beside the quantized weights, without the waste",
    fused=True,
    trainer=True,
)

PREVIEW_EXACT = NumericsProfile(
    name="preview-exact",
    description="the trainer's own sequence of operations, bit-identical to its samples on the same GPU and torch",
    fused=False,
    trainer=True,
)

PROFILES: Mapping[str, NumericsProfile] = MappingProxyType(
    {profile.name: profile for profile in (REFERENCE, EXACT, FP8, PREVIEW, PREVIEW_EXACT)}
)

TRAINER_CHOICES = ("auto", "bfloat16")
"""Settings of the dtype under which the trainer's own sequence of operations is served."""


def served_profiles(device: torch.device, dtype: str = "auto") -> tuple[str, ...]:
    """Those that a device can compute, as far as an operator wants its dtype.

    Float8 products need compute capability 8.9; a CPU emulates them. `preview-exact` computes in the trainer's
    dtype: where another one is asked for, it is not there.

    Args:
        device: what computes.
        dtype: `auto`, or the name of what an operator says to compute in.
    """
    has_float8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return tuple(
        name
        for name, profile in PROFILES.items()
        if (has_float8 or not profile.float8_products)
        and (profile is not PREVIEW_EXACT or dtype in TRAINER_CHOICES)
    )
