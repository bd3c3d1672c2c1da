"""Chroma's transformer: parameter names are the checkpoint's own, dtypes are explicit at every step.

One forward serves every numerics profile: the caller decides how text is padded or masked, how modulations are
batched, and whether weights are held dequantized (see `profiles`).

Shapes: B batch, N image tokens (h/16 · w/16), L text tokens, S steps, C hidden size, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.pipeline.models.blocks import DoubleBlock, SingleBlock
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import Linear, RMSNorm, modulate
from chromarpc_server.pipeline.models.positions import sinusoids

TIMESTEP_FEATURES = 16
SLOT_INDEX_FEATURES = 32


class ApproximatorLayer(nn.Module):
    """out(silu(in(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = Linear(width, width)
        self.out_layer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same."""
        return self.out_layer(F.silu(self.in_layer(x)))  # type: ignore[no-any-return]


class Approximator(nn.Module):
    """Makes every modulation vector from a timestep: what guidance distillation left of Flux's modulations."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        width = config.approximator_hidden_size
        self.in_proj = Linear(config.approximator_in_dim, width)
        self.layers = nn.ModuleList(ApproximatorLayer(width) for _ in range(config.approximator_depth))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(config.approximator_depth))
        self.out_proj = Linear(width, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(S, slots, features) → (S, slots, C)."""
        x = self.in_proj(features)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection back to latent patches."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """X (B, N, C), modulation (B, 2, C) → (B, N, in_channels)."""
        shift, scale = mod.split(1, dim=1)
        return self.linear(modulate(x, shift, scale))  # type: ignore[no-any-return]


class ChromaTransformer(nn.Module):
    """Predicts the velocity noise − x0 of packed latents."""

    def __init__(self, config: ChromaConfig) -> None:
        """Construct under `torch.device("meta")` to allocate nothing; assign weights afterwards."""
        super().__init__()
        self.config = config
        self.img_in = Linear(config.in_channels, config.hidden_size)
        self.txt_in = Linear(config.context_in_dim, config.hidden_size)
        self.distilled_guidance_layer = Approximator(config)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)

    def modulations(self, timestep: Tensor) -> Tensor:
        """Every block's modulation vectors, which depend on the timestep alone.

        Args:
            timestep: (S,) in 0…1, in the latents' dtype, whose rounding is part of the function.

        Returns:
            (S, slots, C): single blocks 3 each (shift, scale, gate), double blocks' image 6 each (attention, then
            MLP), double blocks' text 6 each, final layer 2 (shift, scale).
        """
        slots = self.config.modulation_slots
        steps = timestep.shape[0]
        time = sinusoids(timestep, TIMESTEP_FEATURES).float()
        guidance = sinusoids(torch.zeros(steps, device=timestep.device), TIMESTEP_FEATURES)
        index = sinusoids(torch.arange(slots, device=timestep.device), SLOT_INDEX_FEATURES)
        per_step = torch.cat([time, guidance], dim=1)[:, None].expand(steps, slots, -1)
        features = torch.cat([per_step, index[None].expand(steps, slots, -1)], dim=-1)
        return self.distilled_guidance_layer(features)  # type: ignore[no-any-return]

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        modulations: Tensor,
        rope: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of packed latents.

        Args:
            img: (B, N, in_channels) packed latents.
            txt: (B, L, context) text embeddings.
            modulations: (B, slots, C), from `modulations`.
            rope: from `rope_table`, for L text tokens.
            attention_mask: broadcastable to (B, H, L + N, L + N) bool, or None where all may attend to all.

        Returns:
            (B, N, in_channels) in the weights' dtype.
        """
        singles, doubles = self.config.depth_single_blocks, self.config.depth
        parts = modulations.split([3 * singles, 6 * doubles, 6 * doubles, 2], dim=1)
        img = self.img_in(img)
        txt = self.txt_in(txt)
        text_tokens = txt.shape[1]
        for index, block in enumerate(self.double_blocks):
            slots = slice(6 * index, 6 * index + 6)
            img, txt = block(img, txt, parts[1][:, slots], parts[2][:, slots], rope, attention_mask)
        x = torch.cat((txt, img), dim=1)
        for index, block in enumerate(self.single_blocks):
            x = block(x, parts[0][:, 3 * index : 3 * index + 3], rope, attention_mask)
        return self.final_layer(x[:, text_tokens:], parts[3])  # type: ignore[no-any-return]


def linear_weights(config: ChromaConfig) -> tuple[str, ...]:
    """Names of the parameters that are linear layers' weights."""
    with torch.device("meta"):
        model = ChromaTransformer(config)
    return tuple(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear))
