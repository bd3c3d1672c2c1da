"""From files to a pipeline that draws: load once, prepare for adapters and a profile, then generate.

A `Checkpoint` holds the master weights as they were stored. A `PreparedTransformer` of it has adapters merged,
before quantization as the reference does. A `Pipeline` draws with one, and nothing on it changes between calls.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline import autoencoder, sampling, text_encoder
from chromarpc_server.pipeline.device import usable_memory_bytes
from chromarpc_server.pipeline.fused.check import kernels_fallback, warm_up_kernels
from chromarpc_server.pipeline.fused.decoder import with_fused_decoder
from chromarpc_server.pipeline.memory import PartSizes, pin, plan_memory
from chromarpc_server.pipeline.pacing import beside
from chromarpc_server.pipeline.prepared import AdapterSet, PreparedTransformer, prepared_bytes
from chromarpc_server.pipeline.preview import LatentPreview
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.safetensors_file import SafetensorsFile
from chromarpc_server.pipeline.sampling import DenoiseStep
from chromarpc_server.pipeline.staging import tensor_hash_prefix
from chromarpc_server.pipeline.text_encoder import PromptEmbedding, RecordedEncoder, TokenizedPrompt, Tokenizer
from chromarpc_server.pipeline.transformer import (
    ChromaConfig,
    ChromaTransformer,
    dense_attention_mask,
    rope_table,
)
from chromarpc_server.pipeline.weights import (
    Check,
    CheckpointFiles,
    Progress,
    ReadingProgress,
    open_weights,
    read_json,
    require_same_keys,
    shard_paths,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TILE_PX = 512
"""Side of a tile, where pictures are decoded in tiles."""
WARM_UP_WORDS = (8, 40, 72, 104)
"""Prompt lengths to warm up for: each falls into another of the fused forward's shapes."""
GUIDED = 4.0
"""A guidance scale that makes both passes."""


@dataclass(frozen=True)
class Pipeline:
    """Everything that draws, with one adapter set merged. Immutable; calls share nothing but weights."""

    transformer: PreparedTransformer = field(repr=False)
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
    """Embeddings and mask of the empty prompt: constants of the checkpoint."""
    decoder_fallback: DeviceFallback | None = None
    """Why the decoder is not the fused one, where it should be."""

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """What the device does without, as far as it was tried."""
        found = (
            kernels_fallback(self.device),
            self.decoder_fallback,
            *self.transformer.fallbacks,
            self.text_encoder.fallback,
        )
        return tuple(fallback for fallback in found if fallback is not None)

    @property
    def tiled_beyond_px(self) -> int | None:
        """Longer sides than this are decoded in tiles; None where nothing is."""
        return self.autoencoder.tile_sample_min_size if self.autoencoder.use_tiling else None

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        """Tokenizes a prompt; needs no device."""
        return self.tokenizer(prompt)

    def encode(self, tokens: TokenizedPrompt) -> PromptEmbedding:
        """Embeds a prompt, beside the unconditional text."""
        embeds = self.text_encoder(tokens.ids)
        return PromptEmbedding(embeds, tokens.mask.to(self.device), *self.empty)

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
    ) -> Iterator[DenoiseStep]:
        """Draws one image's latents, yielding after every step; a GPU may still be computing it then.

        Args:
            embedding: from `encode`.
            width: pixels, a multiple of 16.
            height: pixels, a multiple of 16.
            steps: Euler steps, 1 or more.
            guidance_scale: classifier-free guidance; at 1 and below a single pass is made.
            seed: of the initial noise.
            noise_draw: `float32` or `legacy`.
        """
        noise = sampling.draw_noise(width, height, seed, self.stored_dtype, noise_draw)
        yield from denoise_from(
            self.transformer,
            embedding,
            noise.to(device=self.device, dtype=self.dtype),
            width,
            height,
            steps,
            guidance_scale,
            timestep_dtype=self.stored_dtype,
        )

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Draws a little at each size (width, height) with prompts of several lengths: kernels are compiled,
        algorithms planned and graphs recorded before anybody waits for them.
        """
        warm_up_kernels(self.transformer.model.config, self.device)
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
            if self.transformer.profile.fused and self.transformer.run.records_ahead:
                for embedding in embeddings[1:]:
                    _record_step(self.transformer, embedding, last.latents, width, height)

    def decode(self, latents: Tensor, width: int, height: int) -> npt.NDArray[np.uint8]:
        """Packed latents (1, N, 64) → pixels (h, w, 3) uint8."""
        image = autoencoder.decode(self.autoencoder, sampling.unpack(latents, width, height))
        return autoencoder.to_pixels(image)

    def preview(self, step: DenoiseStep, width: int, height: int, max_side: int) -> npt.NDArray[np.uint8]:
        """A small picture (height, width, 3) uint8 of what a finished step predicts."""
        with beside(self.device) if self.device.type == "cuda" else nullcontext():
            return self.latent_preview.render(sampling.unpack(step.predicted_x0, width, height), max_side)


@torch.inference_mode()
def denoise_from(
    transformer: PreparedTransformer,
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

    `timestep_dtype` is what timesteps are rounded to: the noise's dtype, as in the reference, unless told
    otherwise.
    """
    grid = sampling.token_grid(width, height)
    scheduler = sampling.make_scheduler(noise.shape[1], steps, noise.device)
    seen = sampling.seen_timesteps(scheduler, timestep_dtype or noise.dtype)
    timesteps = seen.to(noise.dtype) / 1000
    texts = [_Text.of(embedding.embeds, embedding.mask, noise)]
    if guidance_scale > sampling.GUIDANCE_THRESHOLD:
        texts.append(_Text.of(embedding.empty_embeds, embedding.empty_mask, noise))
    make = _fused_velocity if transformer.profile.fused else _padded_velocity
    yield from sampling.denoise(noise, scheduler, seen, guidance_scale, make(transformer, texts, timesteps, grid))


@dataclass(frozen=True)
class _Text:
    """One text on the device: (1, L, context) embeddings and (1, L) mask."""

    embeds: Tensor
    mask: Tensor

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, like: Tensor) -> _Text:
        """On the device and in the dtype of `like`."""
        return cls(embeds.to(device=like.device, dtype=like.dtype), mask.to(like.device))

    @property
    def kept(self) -> Tensor:
        """(real + 1, context): what attention sees."""
        return self.embeds[0, : int(self.mask.sum()) + 1]


def _fused_velocity(
    transformer: PreparedTransformer, texts: Sequence[_Text], timesteps: Tensor, grid: tuple[int, int]
) -> sampling.Velocity:
    """Both passes at once over packed tokens, with the modulations of all steps made before."""
    modulations = transformer.model.modulations(timesteps)
    conditioning = transformer.run.fused.condition([text.kept for text in texts], grid)

    def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        found = transformer.run(latents[0], conditioning, modulations[index])
        return found[:1], found[1:] if len(texts) > 1 else None

    return velocity


@torch.inference_mode()
def _record_step(
    transformer: PreparedTransformer, embedding: PromptEmbedding, latents: Tensor, width: int, height: int
) -> None:
    """Has a step for prompts of this length and pictures of this size ready, without running it."""
    texts = [
        _Text.of(embedding.embeds, embedding.mask, latents),
        _Text.of(embedding.empty_embeds, embedding.empty_mask, latents),
    ]
    modulations = transformer.model.modulations(torch.ones(1, dtype=latents.dtype, device=latents.device))
    conditioning = transformer.run.fused.condition(
        [text.kept for text in texts], sampling.token_grid(width, height)
    )
    transformer.run.record(latents[0], conditioning, modulations[0])


def _padded_velocity(
    transformer: PreparedTransformer, texts: Sequence[_Text], timesteps: Tensor, grid: tuple[int, int]
) -> sampling.Velocity:
    """As the reference: one pass after the other, 512 text tokens under a dense mask, modulations step by step."""
    model = transformer.model
    rope = rope_table(model.config, texts[0].embeds.shape[1], grid, timesteps.device)
    masks = [dense_attention_mask(text.mask, grid[0] * grid[1], model.config.num_heads) for text in texts]

    def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        modulations = model.modulations(timesteps[index : index + 1])
        passes = [
            model(latents, text.embeds, modulations, rope, mask) for text, mask in zip(texts, masks, strict=True)
        ]
        return passes[0], passes[1] if len(passes) > 1 else None

    return velocity


@dataclass(frozen=True)
class Checkpoint:
    """A model's master weights as they were stored, and the parts that adapters leave alone."""

    config: ChromaConfig
    master: Mapping[str, Tensor] = field(repr=False)
    """The transformer's parameters, on the device or in (pinned) host memory."""
    text_encoder: RecordedEncoder = field(repr=False)
    autoencoder: AutoencoderKL = field(repr=False)
    fused_autoencoder: AutoencoderKL = field(repr=False)
    """The same one for profiles that are fused: the same weights, another decoder where that is faster."""
    tokenizer: Tokenizer = field(repr=False)
    latent_preview: LatentPreview = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    revision: str
    """Hash over names, shapes and values of the transformer's weights, hexadecimal."""
    size_bytes: int
    empty: tuple[Tensor, Tensor] = field(repr=False)
    memory: MemoryPlan | None = None
    """What stays where; None on a CPU."""
    decoder_fallback: DeviceFallback | None = None
    """Why `fused_autoencoder` is not fused, where it should be."""

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """What adapters can change: parameter name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.master.items()}

    @classmethod
    def load(
        cls,
        files: CheckpointFiles,
        *,
        device: torch.device,
        dtype: torch.dtype,
        memory: MemoryChoice | None = None,
        progress: Progress = lambda _: None,
        check: Check = lambda: None,
    ) -> Checkpoint:
        """Reads everything once.

        Args:
            files: where it lies.
            device: where text encoder and autoencoder are put, and pipelines will run.
            dtype: what to compute in.
            memory: what an operator decides about a GPU's memory.
            progress: told how far reading is.
            check: called between tensors; raises to stop.

        Raises:
            WeightsInvalid: damaged files, or another model.
            OutOfMemory: the GPU has too little memory for it.
        """
        transformer_file = open_weights(files.transformer)
        encoder_files = text_encoder.open_text_encoder(files.text_encoder)
        vae_files = tuple(open_weights(path) for path in shard_paths(files.vae))
        config = ChromaConfig.from_shapes(transformer_file.shapes, transformer_file.metadata)
        with torch.device("meta"):
            expected = ChromaTransformer(config).state_dict()
        require_same_keys(expected, transformer_file.tensors, files.transformer.name)

        plan = None
        if device.type == "cuda":
            choice = memory or MemoryChoice()
            sizes = _part_sizes(transformer_file, encoder_files, vae_files, dtype)
            plan = plan_memory(usable_memory_bytes(device, choice.device_bytes), sizes, choice)
        reading = ReadingProgress((transformer_file, *encoder_files, *vae_files), progress, check)
        master, revision = _read_master(reading, transformer_file, device, plan)
        tokenizer = Tokenizer(files.tokenizer)
        encoder = text_encoder.build_text_encoder(
            # Read before transformers is asked for, which a starting server is still importing.
            weights=text_encoder.read_all(encoder_files, reading, _onto(device, plan, encoder_files)),
            config=text_encoder.text_encoder_config(files.text_encoder),
            device=device,
            dtype=dtype,
            quantize=True,
            hold_float8=plan is not None,
            keep_in_host_memory=plan is not None and plan.text_encoder == "host",
        )
        vae = autoencoder.build_autoencoder(
            read_json(files.vae / "config.json"),
            text_encoder.read_all(vae_files, reading),
            device=device,
            dtype=dtype,
        )
        if plan is not None and plan.tile_autoencoder:
            vae.tile_sample_min_size = TILE_PX
            vae.tile_latent_min_size = TILE_PX // sampling.PIXELS_PER_LATENT
            vae.enable_tiling()
        check()
        empty = tokenizer("")
        not_fused: list[DeviceFallback] = []
        fused_vae = with_fused_decoder(vae, not_fused.append)
        return cls(
            config=config,
            master=master,
            text_encoder=RecordedEncoder(
                encoder, record=plan is not None and plan.record_graphs and plan.text_encoder == "device"
            ),
            autoencoder=vae,
            fused_autoencoder=fused_vae,
            tokenizer=tokenizer,
            latent_preview=LatentPreview.read(files.preview) if files.preview else LatentPreview.flux(),
            device=device,
            dtype=dtype,
            revision=revision,
            size_bytes=sum(
                tensor.numel() * tensor.element_size()
                for tensors in (master.values(), encoder.state_dict().values(), vae.parameters())
                for tensor in tensors
            ),
            empty=(text_encoder.encode(encoder, empty.ids), empty.mask.to(device)),
            memory=plan,
            decoder_fallback=next(iter(not_fused), None),
        )

    def allocate(self, profile: NumericsProfile) -> PreparedTransformer:
        """A transformer of this checkpoint with nothing in it yet; its first `switch` fills it."""
        return PreparedTransformer(
            self.config,
            self.master,
            profile,
            device=self.device,
            dtype=self.dtype,
            hold_float8=self._holds_float8,
            record_graphs=self.memory is None or self.memory.record_graphs,
        )

    def prepared_bytes(self, profile: NumericsProfile) -> int:
        """Size of a transformer prepared in this profile."""
        return prepared_bytes(self.master, profile, self.dtype, hold_float8=self._holds_float8)

    @property
    def _holds_float8(self) -> bool:
        return self.memory is not None and self.memory.weights == "float8"

    def pipeline(self, prepared: PreparedTransformer) -> Pipeline:
        """Everything that draws, with a transformer of this checkpoint as it is now."""
        return Pipeline(
            transformer=prepared,
            text_encoder=self.text_encoder,
            autoencoder=self.fused_autoencoder if prepared.profile.fused else self.autoencoder,
            tokenizer=self.tokenizer,
            latent_preview=self.latent_preview,
            device=self.device,
            dtype=self.dtype,
            stored_dtype=self.master["img_in.weight"].dtype,
            empty=self.empty,
            decoder_fallback=self.decoder_fallback if prepared.profile.fused else None,
        )

    def prepare(self, adapters: AdapterSet, profile: NumericsProfile) -> Pipeline:
        """A pipeline for whoever keeps it: merges adapters and quantizes, once.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
        """
        prepared = self.allocate(profile)
        prepared.switch(adapters)
        return self.pipeline(prepared)


def _part_sizes(
    transformer: SafetensorsFile,
    encoder: Sequence[SafetensorsFile],
    vae: Sequence[SafetensorsFile],
    dtype: torch.dtype,
) -> PartSizes:
    """From the files' headers."""
    wide, stored, float8 = dtype.itemsize, 0, 0
    count = 0
    for name, entry in transformer.tensors.items():
        elements = math.prod(entry.shape)
        stored += entry.size_bytes
        count += elements
        float8 += elements * (1 if "_blocks." in name and len(entry.shape) > 1 else wide)
    text = sum(
        math.prod(entry.shape) * (1 if ".block." in name and len(entry.shape) > 1 else wide)
        for file in encoder
        for name, entry in file.tensors.items()
        if not name.endswith("embed_tokens.weight")
    )
    pixels = sum(math.prod(entry.shape) * wide for file in vae for entry in file.tensors.values())
    return PartSizes(stored, count * wide, float8, text, pixels)


def _onto(device: torch.device, plan: MemoryPlan | None, files: Sequence[SafetensorsFile]) -> torch.device | None:
    """The device, where these files fit there as they are beside everything else; None where they do not."""
    if plan is None:
        return None
    size = sum(entry.size_bytes for file in files for entry in file.tensors.values())
    return device if plan.usable_bytes - plan.estimated_bytes > size else None


def _read_master(
    reading: ReadingProgress, file: SafetensorsFile, device: torch.device, plan: MemoryPlan | None
) -> tuple[dict[str, Tensor], str]:
    """The transformer's weights where the plan wants them, and their hash, computed meanwhile by other threads."""
    master: dict[str, Tensor] = {}
    if plan is not None and plan.master == "device":
        hashes = {}
        for name, tensor, digest in reading.read_onto(file, device):
            master[name], hashes[name] = tensor, digest
        return master, _join_hashes(hashes)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        digests = {}
        for name, tensor in reading.read(file):
            digests[name] = pool.submit(_tensor_hash, name, tensor)
            master[name] = tensor
        revision = _join_hashes({name: digest.result() for name, digest in digests.items()})
    if plan is not None and plan.master == "host":
        master = pin(master, device)
    return master, revision


def _join_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _tensor_hash(name: str, tensor: Tensor) -> str:
    """Hash over name, dtype, shape and values, hexadecimal."""
    digest = hashlib.sha256(tensor_hash_prefix(name, tensor.dtype, tuple(tensor.shape)))
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest.update(values)
    return digest.hexdigest()
