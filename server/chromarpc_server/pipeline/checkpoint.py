"""From files to a pipeline that draws: load once, prepare for adapters and a profile, then generate.

A `Checkpoint` holds the master weights as they were stored. A `PreparedTransformer` of it has adapters merged,
before quantization as the reference does. A `Pipeline` draws with one, and nothing on it changes between calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from chromarpc_server.domain.limits import MasterPlace
from chromarpc_server.pipeline import autoencoder, sampling, text_encoder
from chromarpc_server.pipeline.device import free_memory_bytes
from chromarpc_server.pipeline.prepared import AdapterSet, PreparedTransformer, prepared_bytes
from chromarpc_server.pipeline.preview import LatentPreview
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.sampling import DenoiseStep
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
        """Draws one image's latents, yielding after every step.

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

    def decode(self, latents: Tensor, width: int, height: int) -> npt.NDArray[np.uint8]:
        """Packed latents (1, N, 64) → pixels (h, w, 3) uint8."""
        image = autoencoder.decode(self.autoencoder, sampling.unpack(latents, width, height))
        return autoencoder.to_pixels(image)

    def preview(self, step: DenoiseStep, width: int, height: int, max_side: int) -> npt.NDArray[np.uint8]:
        """A small picture (height, width, 3) uint8 of what a step predicts."""
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
    tokenizer: Tokenizer = field(repr=False)
    latent_preview: LatentPreview = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    revision: str
    """Hash over names, shapes and values of the transformer's weights, hexadecimal."""
    size_bytes: int
    empty: tuple[Tensor, Tensor] = field(repr=False)

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
        master_place: MasterPlace = "auto",
        progress: Progress = lambda _: None,
        check: Check = lambda: None,
    ) -> Checkpoint:
        """Reads everything once.

        Args:
            files: where it lies.
            device: where text encoder and autoencoder are put, and pipelines will run.
            dtype: what to compute in.
            master_place: where the master weights stay; `auto` is the device where they fit twice beside the rest.
            progress: told how far reading is.
            check: called between tensors; raises to stop.

        Raises:
            WeightsInvalid: damaged files, or another model.
        """
        transformer_file = open_weights(files.transformer)
        encoder_files = text_encoder.open_text_encoder(files.text_encoder)
        vae_files = tuple(open_weights(path) for path in shard_paths(files.vae))
        config = ChromaConfig.from_shapes(transformer_file.shapes, transformer_file.metadata)
        with torch.device("meta"):
            expected = ChromaTransformer(config).state_dict()
        require_same_keys(expected, transformer_file.tensors, files.transformer.name)

        reading = ReadingProgress((transformer_file, *encoder_files, *vae_files), progress, check)
        master = dict(reading.read(transformer_file))
        tokenizer = Tokenizer(files.tokenizer)
        encoder = text_encoder.build_text_encoder(
            text_encoder.text_encoder_config(files.text_encoder),
            text_encoder.read_all(encoder_files, reading),
            device=device,
            dtype=dtype,
            quantize=True,
        )
        vae = autoencoder.build_autoencoder(
            read_json(files.vae / "config.json"),
            text_encoder.read_all(vae_files, reading),
            device=device,
            dtype=dtype,
        )
        check()
        empty = tokenizer("")
        revision = content_hash(master)
        return cls(
            config=config,
            master=_place(master, device, master_place, check),
            text_encoder=text_encoder.RecordedEncoder(encoder),
            autoencoder=vae,
            tokenizer=tokenizer,
            latent_preview=LatentPreview.read(files.preview) if files.preview else LatentPreview.flux(),
            device=device,
            dtype=dtype,
            revision=revision,
            size_bytes=sum(
                tensor.numel() * tensor.element_size()
                for tensors in (master.values(), encoder.parameters(), vae.parameters())
                for tensor in tensors
            ),
            empty=(text_encoder.encode(encoder, empty.ids), empty.mask.to(device)),
        )

    def allocate(self, profile: NumericsProfile, *, hold_float8: bool = False) -> PreparedTransformer:
        """A transformer of this checkpoint with nothing in it yet; its first `switch` fills it."""
        return PreparedTransformer(
            self.config, self.master, profile, device=self.device, dtype=self.dtype, hold_float8=hold_float8
        )

    def prepared_bytes(self, profile: NumericsProfile, *, hold_float8: bool = False) -> int:
        """Size of a transformer prepared in this profile."""
        return prepared_bytes(self.master, profile, self.dtype, hold_float8=hold_float8)

    def pipeline(self, prepared: PreparedTransformer) -> Pipeline:
        """Everything that draws, with a transformer of this checkpoint as it is now."""
        return Pipeline(
            transformer=prepared,
            text_encoder=self.text_encoder,
            autoencoder=self.autoencoder,
            tokenizer=self.tokenizer,
            latent_preview=self.latent_preview,
            device=self.device,
            dtype=self.dtype,
            stored_dtype=self.master["img_in.weight"].dtype,
            empty=self.empty,
        )

    def prepare(self, adapters: AdapterSet, profile: NumericsProfile) -> Pipeline:
        """A pipeline for whoever keeps it: merges adapters and quantizes, once.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
        """
        prepared = self.allocate(profile)
        prepared.switch(adapters)
        return self.pipeline(prepared)


def _place(master: dict[str, Tensor], device: torch.device, place: MasterPlace, check: Check) -> dict[str, Tensor]:
    """Moves master weights to where switching reads them from, one tensor at a time."""
    if device.type != "cuda":
        return master
    size = sum(tensor.nbytes for tensor in master.values())
    if place == "auto":
        # Room for the master, one transformer prepared from it, and a third of that for activations.
        place = "device" if free_memory_bytes(device) >= 2.3 * size else "host"
    for name, tensor in master.items():
        check()
        master[name] = tensor.to(device) if place == "device" else tensor.pin_memory()
    return master


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names, dtypes, shapes and values, whatever file they came from, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        values: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
        digest.update(values)
    return digest.hexdigest()
