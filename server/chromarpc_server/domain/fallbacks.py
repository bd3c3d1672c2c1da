"""What a device does without, though it should not have to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What makes a GPU fast. A CPU has none of it and misses none."""

    KERNELS = "kernels"
    """The fused kernels, which Triton compiles."""
    ATTENTION = "attention"
    """FlashAttention-3, where it is installed."""
    DECODER = "decoder"
    """The fused decoder of the autoencoder."""
    STEP_GRAPHS = "step_graphs"
    """Denoising steps, each recorded as one CUDA graph."""
    ENCODER_GRAPH = "encoder_graph"
    """The text encoder, recorded as one CUDA graph."""


_NAMES = {
    Part.KERNELS: "the fused kernels",
    Part.ATTENTION: "FlashAttention-3",
    Part.DECODER: "the fused decoder",
    Part.STEP_GRAPHS: "recorded steps (CUDA graphs)",
    Part.ENCODER_GRAPH: "the recorded text encoder (CUDA graph)",
}


@dataclass(frozen=True)
class DeviceFallback:
    """One part that a device does without, which makes it slower and changes results by roundings at most."""

    without: Part
    reason: str
    """Why, for people; it names no file and quotes no library's message."""

    @property
    def message(self) -> str:
        """A sentence for people."""
        return f"the device does without {_NAMES[self.without]}, which is slower: {self.reason}"
