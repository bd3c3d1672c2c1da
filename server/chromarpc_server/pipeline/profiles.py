"""Numerics profiles: data that one forward is run with, not code paths of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class NumericsProfile:
    """How the same function is computed."""

    name: str
    description: str
    slice_text: bool
    """Cut the embeddings to real + 1 tokens and mask nothing, instead of masking all 512."""
    batch_modulations: bool
    """Make the modulations of all steps at once, instead of one step at a time."""
    dequantize_per_call: bool
    """Hold float8 weights and dequantize at every call, instead of holding w̃ in bf16."""


EXACT = NumericsProfile(
    name="exact",
    description="the reference's own sequence of operations, bit-identical on the same GPU and torch",
    slice_text=False,
    batch_modulations=False,
    dequantize_per_call=True,
)

REFERENCE = NumericsProfile(
    name="reference",
    description="the same function without the waste; as close to the truth as the reference itself",
    slice_text=True,
    batch_modulations=True,
    dequantize_per_call=False,
)

PROFILES: Mapping[str, NumericsProfile] = MappingProxyType(
    {profile.name: profile for profile in (REFERENCE, EXACT)}
)
