"""From embedded text and noise to latents: whatever transformer computes velocities, whichever sampler asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from chromarpc_server.domain.sampling_choices import FLOWMATCH, DrawingSettings, has_guidance
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.samplers import (
    SAMPLERS_BY_NAME,
    Model,
    Sampler,
    SamplerStep,
    evaluated_sigmas,
)
from chromarpc_server.pipeline.sampling import DenoiseStep
from chromarpc_server.pipeline.schedules import COMFYUI_MU, schedule_sigmas


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
        """(real + 1, context): what the reference's attention sees; all of a text without padding."""
        return self.embeds[0, : int(self.mask.sum()) + 1]


class VelocityMaker(Protocol):
    """A transformer with its weights ready."""

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> sampling.Velocity:
        """What computes the velocities of one image.

        Args:
            texts: the prompt and, where guidance is on, the unconditional text.
            timesteps: (S,) in 0…1, of every call in order, in the latents' dtype or in float32.
            grid: rows and columns of image tokens.
        """
        ...


@dataclass(frozen=True)
class SamplingChoice:
    """How an image's steps are taken, by the names that requests use."""

    sampler: str = FLOWMATCH
    schedule: str = FLOWMATCH
    shift: float | None = None
    """Fixed shift of the schedule; None for the schedule's own."""
    settings: DrawingSettings = DrawingSettings.REFERENCE
    mu: float = COMFYUI_MU
    """Flux's shift, in ComfyUI's schedules without a fixed one."""

    @property
    def as_comfyui(self) -> bool:
        """Whether ComfyUI's way is followed where it differs from the reference's."""
        return self.settings is DrawingSettings.COMFYUI

    @property
    def rounds_latents(self) -> bool:
        """Whether latents are kept in the transformer's dtype, as the reference's are; else in float32."""
        return self.sampler == FLOWMATCH and not self.as_comfyui

    def sigmas(self, steps: int, image_tokens: int) -> list[float]:
        """The noise levels of so many steps; see `schedule_sigmas`."""
        return schedule_sigmas(
            self.schedule,
            steps,
            shift=self.shift,
            image_tokens=image_tokens,
            sampler=self.sampler,
            mu=self.mu,
        )

    def evaluated(self, sigmas: Sequence[float]) -> list[float]:
        """The noise level of every call of the model, in order.

        Raises:
            NotComputable: the sampler has no coefficients for these levels.
        """
        return evaluated_sigmas(self.function, sigmas)

    @property
    def function(self) -> Sampler:
        """What takes the steps on float32 latents; of the reference's sampler, Euler's."""
        return SAMPLERS_BY_NAME["euler" if self.sampler == FLOWMATCH else self.sampler]

    def seen_timesteps(self, sigmas: Sequence[float], rounding: torch.dtype) -> Tensor:
        """Timesteps in 0…1000 as the transformer sees them: rounded to this dtype, but as ComfyUI does not."""
        exact = torch.tensor(sigmas, dtype=torch.float32) * 1000
        return exact if self.as_comfyui else exact.to(rounding)

    def has_guidance(self, guidance_scale: float) -> bool:
        """Whether each call makes an unconditional pass, too."""
        return has_guidance(guidance_scale, self.settings)


AS_REFERENCE = SamplingChoice()


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
    choice: SamplingChoice = AS_REFERENCE,
    dtype: torch.dtype | None = None,
) -> Iterator[DenoiseStep]:
    """Runs the transformer over a schedule from given noise (1, N, 64), in the noise's dtype and device.

    Args:
        transformer: computes the velocities.
        embedding: conditional and unconditional text.
        noise: of standard deviation 1.
        width: pixels.
        height: pixels.
        steps: that were asked for; a schedule may make others of them.
        guidance_scale: classifier-free guidance.
        timestep_dtype: what timesteps are rounded to: the noise's dtype, as in the reference, unless another is
            given.
        choice: sampler, schedule and settings.
        dtype: what the transformer takes, where that is another dtype than the noise's.
    """
    grid = sampling.token_grid(width, height)
    like = noise if dtype is None else noise.to(dtype)
    rounding = timestep_dtype or noise.dtype
    texts = [Text.of(embedding.embeds, embedding.mask, like)]
    if choice.has_guidance(guidance_scale):
        texts.append(Text.of(embedding.unconditional_embeds, embedding.unconditional_mask, like))
    if not choice.rounds_latents:
        sampler, sigmas = choice.function, choice.sigmas(steps, noise.shape[1])
        asked = choice.evaluated(sigmas)
        if choice.as_comfyui:
            timesteps = torch.tensor(asked, dtype=torch.float32)
        else:
            timesteps = choice.seen_timesteps(asked, rounding).to(like.dtype) / 1000
        velocity = transformer.velocity(texts, timesteps.to(noise.device), grid)
        model = _predicting(velocity, guidance_scale, like.dtype)
        seen = choice.seen_timesteps(sigmas[:-1], rounding)
        yield from _reported(sampler(model, noise.float() * sigmas[0], sigmas), sigmas, seen.tolist())
        return
    if choice == AS_REFERENCE:
        scheduler = sampling.make_scheduler(noise.shape[1], steps, noise.device)
    else:
        scheduler = sampling.scheduler_of(choice.sigmas(steps, noise.shape[1]), noise.device)
    seen = sampling.seen_timesteps(scheduler, rounding)
    timesteps = seen.to(noise.dtype) / 1000
    yield from sampling.denoise(
        noise, scheduler, seen, guidance_scale, transformer.velocity(texts, timesteps, grid)
    )


def _predicting(velocity: sampling.Velocity, guidance_scale: float, dtype: torch.dtype) -> Model:
    """A sampler's model: x0 as a transformer, which takes `dtype`, predicts it with guidance.

    Calls have to be those that its modulations were made for, in order.
    """
    calls = count()

    def model(x: Tensor, sigma: float) -> Tensor:
        conditional, unconditional = velocity(x.to(dtype), next(calls))
        guided = conditional.to(x.dtype)
        if unconditional is not None:
            other = unconditional.to(x.dtype)
            guided = other + guidance_scale * (guided - other)
        return x - sigma * guided

    return model


def _reported(
    steps: Iterator[SamplerStep], sigmas: Sequence[float], timesteps: Sequence[float]
) -> Iterator[DenoiseStep]:
    """A sampler's steps as they are told; `timesteps`: of each step's first call, as the transformer sees them."""
    total = len(sigmas) - 1
    for index, step in enumerate(steps):
        # What noise a schedule leaves in the end is taken for a part of the image's scale.
        left = sigmas[-1] if index + 1 == total else 0.0
        yield DenoiseStep(
            index=index,
            total=total,
            sigma=sigmas[index],
            timestep=timesteps[index],
            sigmas=tuple(sigmas),
            latents=step.x / (1 - left) if left else step.x,
            predicted_x0=step.denoised,
        )
