"""Adapters for the tiny checkpoint: a few for each owner, known by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from safetensors.torch import save

from tests.faults.history.choices import ADAPTERS

_MODULE = "diffusion_model.double_blocks.0.img_attn.proj"
_WIDTH = 64


@dataclass(frozen=True)
class Adapter:
    """A file to be uploaded."""

    data: bytes
    sha256: str


def adapters_of(owner: str) -> tuple[Adapter, ...]:
    """The owner's own, always the same."""
    return tuple(_adapter(f"{owner}/{number}") for number in range(ADAPTERS))


def _adapter(name: str) -> Adapter:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    data = save(
        {
            f"{_MODULE}.lora_A.weight": torch.randn((2, _WIDTH), generator=generator),
            f"{_MODULE}.lora_B.weight": torch.randn((_WIDTH, 2), generator=generator),
        }
    )
    return Adapter(data, hashlib.sha256(data).hexdigest())
