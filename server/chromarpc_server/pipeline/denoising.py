"""From embedded text and noise to latents: whatever transformer computes the velocities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from chromarpc_server.domain.sampling_choices import GUIDANCE_THRESHOLD
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.sampling import DenoiseStep


@dataclass(frozen=True)
class Text:
    """One text on the device, as the text encoder gave it."""

    embeds: Tensor = field(repr=False)
    """(1, L, context)."""
    mask: Tensor = field(repr=False)
    """(1, L), 1 for real tokens."""

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, like: Tensor) -> Text:
        """On the device and in the dtype of `like`."""
        return cls(embeds.to(device=like.device, dtype=like.dtype), mask.to(like.device))

    @property
    def kept(self) -> Tensor:
        """(real + 1, context): what the reference's attention sees."""
        return self.embeds[0, : int(self.mask.sum()) + 1]


class VelocityMaker(Protocol):
    """A transformer with its weights ready."""

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> sampling.Velocity:
        """What computes the velocities of one image's steps.

        Args:
            texts: the prompt and, where guidance is on, the unconditional text.
            timesteps: (S,) in 0…1, in the latents' dtype.
            grid: rows and columns of image tokens.
        """
        ...


@torch.inference_mode()
def denoise_from(
    transformer: VelocityMaker,
    embedding: PromptEmbedding,
    noise: Tensor,
    width: int,
    height: int,
    steps: int,
    guidance_scale: float,
    *,
    timestep_dtype: torch.dtype | None = None,
) -> Iterator[DenoiseStep]:
    """Runs the transformer over a schedule from given noise (1, N, 64), in the noise's dtype and device.

    `timestep_dtype` is what timesteps are rounded to: the noise's dtype, as in the reference, unless
    another is given.
    """
    grid = sampling.token_grid(width, height)
    scheduler = sampling.make_scheduler(noise.shape[1], steps, noise.device)
    seen = sampling.seen_timesteps(scheduler, timestep_dtype or noise.dtype)
    timesteps = seen.to(noise.dtype) / 1000
    texts = [Text.of(embedding.embeds, embedding.mask, noise)]
    if guidance_scale > GUIDANCE_THRESHOLD:
        texts.append(Text.of(embedding.unconditional_embeds, embedding.unconditional_mask, noise))
    yield from sampling.denoise(
        noise, scheduler, seen, guidance_scale, transformer.velocity(texts, timesteps, grid)
    )
