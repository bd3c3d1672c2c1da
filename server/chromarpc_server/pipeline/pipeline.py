"""Everything that draws, put together: tokenizer, text encoder, transformer, autoencoder, with one adapter set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.denoising import AS_REFERENCE, SamplingChoice, Text, denoise_from
from chromarpc_server.pipeline.device import release_memory
from chromarpc_server.pipeline.fused.check import kernels_fallback, warm_up_kernels
from chromarpc_server.pipeline.models import autoencoder
from chromarpc_server.pipeline.models.text_encoder import (
    PromptEmbedding,
    RecordedEncoder,
    TokenizedPrompt,
    Tokenizer,
)
from chromarpc_server.pipeline.models.weighted_text import embed_weighted, tokenize_weighted
from chromarpc_server.pipeline.pacing import beside
from chromarpc_server.pipeline.pair import Transformer
from chromarpc_server.pipeline.precision import float32_products
from chromarpc_server.pipeline.preview import LatentPreview
from chromarpc_server.pipeline.sampling import DenoiseStep
from chromarpc_server.pipeline.trainer.arithmetic import trainer_arithmetic

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WARM_UP_WORDS = (8, 40, 72, 104)
"""Prompt lengths to warm up for: each falls into another of the fused forward's shapes."""
EMPTY_TOKENS = 1
"""Of the empty prompt: the end mark."""
GUIDED = 4.0
"""A guidance scale that makes both passes."""


@dataclass(frozen=True)
class Pipeline:
    """Everything that draws, with one adapter set merged. Immutable; calls share nothing but weights."""

    transformer: Transformer = field(repr=False)
    text_encoder: RecordedEncoder = field(repr=False)
    autoencoder: AutoencoderKL = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    latent_preview: LatentPreview = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    """What is computed in."""
    stored_dtype: torch.dtype
    """Of the checkpoint: noise is drawn and timesteps are rounded in it, whatever is computed in, because that
    rounding is part of the function that the checkpoint was trained as."""
    empty: tuple[Tensor, Tensor] = field(repr=False)
    """Embeddings and mask of the empty prompt: constants of the checkpoint and its text encoder."""
    decoder_fallback: DeviceFallback | None = None
    """Why the decoder is not the fused one, where it should be."""
    second: torch.device | None = None
    """The other device of a pair, which has a part in the steps alone."""
    gives_back: bool = False
    """What steps and decoding took is given back to the device after each: else the allocator keeps all of it, and
    a card on which as many blocks stay as fit is full."""

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """What the device does without, as far as it was tried."""
        return known_fallbacks(self.device, self.decoder_fallback, self.transformer, self.text_encoder.fallback)

    @property
    def tiled_beyond_px(self) -> int | None:
        """Longer sides than this are decoded in tiles; None where nothing is."""
        return self.autoencoder.tile_sample_min_size if self.autoencoder.use_tiling else None

    def tokenize(self, prompt: str, settings: DrawingSettings = DrawingSettings.REFERENCE) -> TokenizedPrompt:
        """Tokenizes a prompt, padded to 512 or as ComfyUI does; needs no device."""
        if settings is DrawingSettings.COMFYUI:
            return tokenize_weighted(self.tokenizer, prompt)
        return self.tokenizer(prompt)

    def encode(self, tokens: TokenizedPrompt, negative: TokenizedPrompt | None = None) -> PromptEmbedding:
        """Embeds a prompt, and beside it the unconditional text: the negative prompt if there is one."""
        embeds = embed_weighted(self.text_encoder, tokens)
        if negative is not None and negative.token_count > EMPTY_TOKENS:
            unconditional = embed_weighted(self.text_encoder, negative), negative.mask.to(self.device)
        elif tokens.padded:
            unconditional = self.empty
        else:
            end_mark = self.text_encoder.end_mark
            unconditional = end_mark, torch.ones(end_mark.shape[:2], dtype=torch.int64, device=self.device)
        return PromptEmbedding(embeds, tokens.mask.to(self.device), *unconditional)

    def denoise(
        self,
        embedding: PromptEmbedding,
        *,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        noise_draw: str,
        choice: SamplingChoice = AS_REFERENCE,
    ) -> Iterator[DenoiseStep]:
        """Draws one image's latents, yielding after every step; a GPU may still be computing it then.

        Args:
            embedding: from `encode`.
            width: pixels, a multiple of 16.
            height: pixels, a multiple of 16.
            steps: 1 or more; see `SamplingChoice.sigmas`.
            guidance_scale: classifier-free guidance; at 1 and below a single pass is made, as ComfyUI at 1 only.
            seed: of the initial noise.
            noise_draw: `float32` or `legacy`.
            choice: sampler, schedule and settings.
        """
        drawn_in = torch.float32 if choice.as_comfyui else self.stored_dtype
        noise = sampling.draw_noise(width, height, seed, drawn_in, noise_draw)
        kept_in = self.dtype if choice.rounds_latents else torch.float32
        drawn = denoise_from(
            self.transformer,
            embedding,
            noise.to(device=self.device, dtype=kept_in),
            width,
            height,
            steps,
            guidance_scale,
            timestep_dtype=self.stored_dtype,
            choice=choice,
            dtype=self.dtype,
        )
        while True:
            with self._products():
                step = next(drawn, None)
            if step is None:
                return
            yield step

    def _products(self) -> AbstractContextManager[None]:
        """For whatever is computed in the pipeline's dtype; see `float32_products`."""
        return float32_products(self.device) if self.dtype == torch.float32 else nullcontext()

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Draws a little at each size (width, height) with prompts of several lengths: kernels are compiled,
        algorithms planned and graphs recorded before anybody waits for them.
        """
        if self.transformer.profile.fused:
            for device in (self.device, self.second):
                if device is not None:
                    warm_up_kernels(self.transformer.config, device)
        embeddings = [self.encode(self.tokenize("a " * words)) for words in WARM_UP_WORDS]
        for width, height in sizes:
            # Two steps: the first runs, the second is recorded and runs.
            *_, last = self.denoise(
                embeddings[0],
                width=width,
                height=height,
                steps=2,
                guidance_scale=GUIDED,
                seed=0,
                noise_draw="float32",
            )
            self.decode(last.latents, width, height)
            if self.transformer.records_ahead:
                for embedding in embeddings[1:]:
                    pairs = (embedding.embeds, embedding.mask), self.empty
                    texts = [Text.of(*pair, last.latents) for pair in pairs]
                    self.transformer.record(texts, last.latents, sampling.token_grid(width, height))

    def decode(
        self,
        latents: Tensor,
        width: int,
        height: int,
        drawing: DrawingSettings = DrawingSettings.REFERENCE,
    ) -> npt.NDArray[np.uint8]:
        """Packed latents (1, N, 64) → pixels (h, w, 3) uint8, rounded, or cut off as ComfyUI does.

        In the trainer's profiles they are rounded as the trainer rounds them, whatever is computed in: in bf16 a
        step between pixels is as large as one of their 256 values.
        """
        settings = self.transformer.settings
        as_comfyui = drawing is DrawingSettings.COMFYUI
        rounding = None if settings is None else self.stored_dtype
        if as_comfyui:
            rounding = torch.float32
        as_trainer = settings if not self.transformer.profile.fused else None
        with trainer_arithmetic(self.device, as_trainer) if as_trainer else self._products():
            self._give_back()
            image = autoencoder.decode(self.autoencoder, sampling.unpack(latents, width, height), rounding)
        pixels = autoencoder.to_pixels(image, truncated=as_comfyui)
        del image
        self._give_back()
        return pixels

    def _give_back(self) -> None:
        if self.gives_back:
            release_memory(self.device)

    def preview(self, step: DenoiseStep, width: int, height: int, max_side: int) -> npt.NDArray[np.uint8]:
        """A small image (height, width, 3) uint8 of what a finished step predicts."""
        with beside(self.device) if self.device.type == "cuda" else nullcontext():
            return self.latent_preview.render(sampling.unpack(step.predicted_x0, width, height), max_side)


def known_fallbacks(
    device: torch.device,
    decoder: DeviceFallback | None,
    transformer: Transformer,
    encoder: DeviceFallback | None,
) -> tuple[DeviceFallback, ...]:
    """What a device does without for a transformer, its text encoder and its decoder."""
    found = (kernels_fallback(device), decoder, *transformer.fallbacks, encoder)
    return tuple(dict.fromkeys(fallback for fallback in found if fallback is not None))
