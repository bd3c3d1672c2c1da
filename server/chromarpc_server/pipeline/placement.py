"""Where a transformer lies on a device, and what it takes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DevicePlacement:
    """Where a transformer lies, what it computes in, and how it spends the device's memory.

    A memory plan decides it for all transformers of a checkpoint.
    """

    device: torch.device
    dtype: torch.dtype
    """What it computes in."""
    hold_float8: bool = False
    """Hold the blocks' weights in float8 wherever that gives the same values: half the memory, a little slower."""
    record_graphs: bool = True
    """Record steps as CUDA graphs, which keep a step's activations; never where blocks are streamed."""
    streamed_blocks: int = 0
    """Blocks whose weights lie in host memory, and are copied to the device in every step."""
