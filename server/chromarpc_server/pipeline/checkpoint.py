"""From files to a pipeline that draws: load once, prepare for adapters and a profile, then generate.

A `Checkpoint` holds the master weights as they were stored. A `PreparedTransformer` of it has adapters merged,
before quantization as the reference does; `trainer` has the forms that draw the trainer's image. A `Pipeline`
draws with one, and nothing on it changes between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.device import release_memory, select_device, usable_memory_bytes
from chromarpc_server.pipeline.fused.decoder import with_fused_decoder
from chromarpc_server.pipeline.memory import working_bytes
from chromarpc_server.pipeline.merged_transformer import (
    AdapterSet,
    PreparedTransformer,
    prepared_bytes,
    unrounded_text,
)
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.text_encoder import RecordedEncoder, Tokenizer
from chromarpc_server.pipeline.models.transformer import linear_weights
from chromarpc_server.pipeline.opening import OpenCheckpoint
from chromarpc_server.pipeline.pair import Transformer, TransformerPair
from chromarpc_server.pipeline.pipeline import Pipeline, known_fallbacks
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.preview import LatentPreview
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.progress import SILENT, LoadContext
from chromarpc_server.pipeline.streamed import BlockSizes
from chromarpc_server.pipeline.trainer.approximator import held_dtype
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.trainer.parts import TrainerParts
from chromarpc_server.pipeline.trainer.sizes import factor_bytes, padded_bytes
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.master import read_master
from chromarpc_server.pipeline.weights.quantizers import FLOAT8_QTYPES
from chromarpc_server.pipeline.weights.reading import CheckpointFiles
from chromarpc_server.pipeline.weights.shared import WeightFiles
from chromarpc_server.pipeline.weights.stored import StoredWeights, rounding_dtype

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TILE_PX = 512
"""Side of a tile, where images are decoded in tiles."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's master weights as they were stored, and the parts that adapters leave alone."""

    config: ChromaConfig
    master: StoredWeights = field(repr=False)
    """The transformer's parameters as they are stored, on the device or in (pinned) host memory."""
    stored_as: str
    """What most of them are stored as, for people: `bf16`, `fp8 scaled`, `GGUF Q4_K`."""
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
    trainer_parts: TrainerParts = field(repr=False)
    memory: MemoryPlan | None = None
    """What stays where; None on a CPU."""
    second: torch.device | None = None
    """The other device of a pair, which has a transformer's prepared weights and nothing else."""
    decoder_fallback: DeviceFallback | None = None
    """Why `fused_autoencoder` is not fused, where it should be."""
    left_out: str = ""
    """What its files hold and no part of it is, for people; empty where there is nothing."""
    shared: tuple[object, ...] = field(repr=False, default=())
    """What other devices of this host find as long as it is held here."""

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """What adapters can change: parameter name to shape."""
        return {name: stored.shape for name, stored in self.master.items()}

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """What the checkpoint counts as stored in: noise is drawn and timesteps are rounded in it."""
        return rounding_dtype({name: stored.recipe for name, stored in self.master.items()})

    @classmethod
    def load(
        cls,
        files: CheckpointFiles,
        *,
        device: torch.device,
        dtype: torch.dtype,
        second: torch.device | None = None,
        memory: MemoryChoice | None = None,
        context: LoadContext = SILENT,
        weights: WeightFiles | None = None,
    ) -> Checkpoint:
        """Reads everything once.

        Args:
            files: where it lies.
            device: where text encoder and autoencoder are put, and pipelines will run.
            dtype: what to compute in.
            second: the other device of a pair, where transformers are put as well.
            memory: what an operator decides about a GPU's memory.
            context: reports how far reading is; checked between tensors.
            weights: what this host's devices have in common; by default nothing.

        Raises:
            WeightsInvalid: damaged files, or another model.
            OutOfMemory: the GPU or the host has too little memory for it.
        """
        weights = weights or WeightFiles()
        opened = OpenCheckpoint.open(files, weights)
        plan = opened.plan(device, dtype, memory or MemoryChoice(), second, weights)
        reading = ReadingProgress(opened.parts, context)
        master, revision = read_master(reading, opened.transformer.part, weights, device, plan)
        tokenizer = Tokenizer(files.tokenizer, vocabulary=opened.text_encoder.vocabulary)
        encoder = text_encoder.build_text_encoder(
            # Read before transformers is asked for, which a starting server is still importing.
            weights=reading.stored(opened.text_encoder.part, opened.text_encoder_onto(device, plan)),
            config=text_encoder.text_encoder_config(opened.text_encoder.config),
            device=device,
            dtype=dtype,
            quantize=True,
            rounding=opened.text_encoder.rounding,
            hold_float8=plan is not None,
            keep_in_host_memory=plan is not None and plan.text_encoder == "host",
            pinned=lambda tensors: weights.pinned(
                opened.text_encoder_key(device, dtype),
                device,
                lambda _: tensors,
                context.check,
            ),
        )
        if plan is not None and plan.streamed_blocks:
            # What quantizing took for a while would be cut up by what stays.
            release_memory(device)
        vae = autoencoder.build_autoencoder(
            opened.autoencoder.config,
            reading.stored(opened.autoencoder.part),
            device=device,
            dtype=dtype,
        )
        if plan is not None and plan.tile_autoencoder:
            vae.tile_sample_min_size = TILE_PX
            vae.tile_latent_min_size = TILE_PX // sampling.PIXELS_PER_LATENT
            vae.enable_tiling()
        context.check()
        empty = tokenizer("")
        not_fused: list[DeviceFallback] = []
        fused_vae = with_fused_decoder(vae, not_fused.append)
        return cls(
            config=opened.transformer.config,
            master=master,
            stored_as=opened.transformer.part.stored_as,
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
                tensor.nbytes
                for tensors in (master.values(), encoder.state_dict().values(), vae.parameters())
                for tensor in tensors
            ),
            empty=(text_encoder.encode(encoder, empty.ids), empty.mask.to(device)),
            trainer_parts=TrainerParts(
                files,
                device,
                hold_float8=plan is not None,
                keep_in_host_memory=plan is not None and plan.trainer_text_encoder == "host",
                record=plan is not None and plan.record_graphs,
                fits=partial(_fits_beside, device, plan, memory or MemoryChoice()),
                weights=weights,
            ),
            memory=plan,
            second=second,
            decoder_fallback=next(iter(not_fused), None),
            left_out=opened.text_encoder.left_out,
            # Files stay mapped where the master is: a GPU that has a copy has no more use for them.
            shared=(*opened.files, *(reading.mapped if plan is None or plan.master == "mapped" else ())),
        )

    def allocate(
        self, profile: NumericsProfile, trainer: TrainerSettings | None = None, *, rounded: bool = True
    ) -> Transformer:
        """A transformer of this checkpoint with nothing in it yet; its first `switch` fills it.

        Args:
            profile: what it will be run with.
            trainer: what the trainer's config says, for profiles that draw the trainer's image; None: its
                defaults.
            rounded: whether weights go through float8 as the reference's do; see `NumericsProfile.must_round`.

        Raises:
            InvalidParameter: the profile needs the whole transformer on the device, and blocks are streamed.
        """
        withheld = "" if self.memory is None else self.memory.withholds(profile.name)
        if withheld:
            raise InvalidParameter(withheld, field="profile")
        rounded = rounded or profile.must_round(self.memory)
        first = self._allocate_on(self.device, profile, trainer, rounded)
        if self.second is None:
            return first
        other = self._allocate_on(self.second, profile, trainer, rounded)
        return TransformerPair(first, other, self.second, self._helper)

    @cached_property
    def _helper(self) -> ThreadPoolExecutor | None:
        """What gives a second GPU its work; a CPU has its threads for one thing at a time."""
        if self.second is None or self.second.type != "cuda":
            return None
        return ThreadPoolExecutor(1, "second-device", initializer=select_device, initargs=(self.second,))

    def _allocate_on(
        self, device: torch.device, profile: NumericsProfile, trainer: TrainerSettings | None, rounded: bool
    ) -> Transformer:
        if not profile.trainer:
            placement = self._placement(device, self.dtype)
            return PreparedTransformer(self.config, self.master, profile, placement, quantize=rounded)
        settings = trainer or TrainerSettings()
        if not profile.fused:
            return ExactPreview(self.config, self.master, profile, settings, device=device)
        placement = self._placement(device, self._fused_dtype(settings))
        return FusedPreview(self.config, self.master, profile, settings, placement)

    def _placement(self, device: torch.device, dtype: torch.dtype) -> DevicePlacement:
        if self.memory is None:
            return DevicePlacement(device, dtype)
        plan = self.memory
        return DevicePlacement(device, dtype, self._holds_float8, plan.record_graphs, plan.streamed_blocks)

    def prepared_bytes(
        self, profile: NumericsProfile, trainer: TrainerSettings | None = None, adapters: AdapterSet = ()
    ) -> int:
        """Size of a transformer prepared in this profile, with what of these adapters lies beside its weights.

        Of a pair, on each device.
        """
        if not profile.trainer:
            whole = prepared_bytes(self.master, profile, lambda _: self.dtype, hold_float8=self._holds_float8)
            return whole - BlockSizes.of(self.targets).saved_bytes(self._streamed_blocks)
        settings = trainer or TrainerSettings()
        dtype = self._parts_dtype(profile, settings)
        float8 = profile.fused and self._holds_float8 and settings.quantize and settings.qtype in FLOAT8_QTYPES
        dtype_of = partial(held_dtype, dtype=dtype, modulation_dtype=TORCH_DTYPES[settings.dtype])
        weights = prepared_bytes(self.master, profile, dtype_of, hold_float8=float8)
        linears = self._linears
        if not profile.fused:
            return weights + factor_bytes(adapters, tuple(linears), settings)
        in_float8 = [name for name in linears if float8 and "_blocks." in name]
        return weights + padded_bytes(adapters, linears, settings, dtype_of, in_float8=in_float8)

    @cached_property
    def _linears(self) -> Mapping[str, tuple[int, ...]]:
        """The linear layers' weights, name to shape: asked for at every switch, and slow to find."""
        return {name: self.master[name].shape for name in linear_weights(self.config)}

    def text_settings(
        self, profile: NumericsProfile, trainer: TrainerSettings | None, *, rounded: bool = True
    ) -> TrainerSettings | None:
        """Which of the trainer's text encoders a transformer is used with; None: with the checkpoint's own."""
        if profile.trainer:
            return trainer or TrainerSettings()
        return None if rounded or profile.must_round(self.memory) else unrounded_text(self.dtype)

    def missing_bytes(
        self, profile: NumericsProfile, trainer: TrainerSettings | None, *, rounded: bool = True
    ) -> int:
        """What `pipeline` has yet to put on the device for a transformer of this profile: the trainer's parts."""
        settings = self.text_settings(profile, trainer, rounded=rounded)
        if settings is None:
            return 0
        if not profile.trainer:
            return self.trainer_parts.missing_bytes(settings, self.autoencoder.dtype, self.autoencoder.dtype)
        return self.trainer_parts.missing_bytes(
            settings, self._parts_dtype(profile, settings), self.autoencoder.dtype
        )

    def _parts_dtype(self, profile: NumericsProfile, settings: TrainerSettings) -> torch.dtype:
        """What a profile that draws the trainer's image computes in."""
        return self._fused_dtype(settings) if profile.fused else TORCH_DTYPES[settings.dtype]

    @property
    def _streamed_blocks(self) -> int:
        return 0 if self.memory is None else self.memory.streamed_blocks

    @property
    def _holds_float8(self) -> bool:
        return self.memory is not None and self.memory.weights == "float8"

    def pipeline(self, prepared: Transformer, context: LoadContext = SILENT) -> Pipeline:
        """Everything that draws, with a transformer of this checkpoint as it is now.

        Args:
            prepared: the transformer.
            context: reports on a text encoder, where one has to be made first; checked between its tensors.

        Raises:
            WeightsInvalid: a text encoder has a row that the trainer's quantizer turns into NaN.
        """
        if prepared.settings is not None:
            return self._trainer_pipeline(prepared, prepared.settings, context)
        text = prepared.text_settings
        return Pipeline(
            transformer=prepared,
            text_encoder=self.text_encoder if text is None else self.trainer_parts.text_encoder(text, context),
            autoencoder=self.fused_autoencoder if prepared.profile.fused else self.autoencoder,
            tokenizer=self.tokenizer,
            latent_preview=self.latent_preview,
            device=self.device,
            dtype=self.dtype,
            stored_dtype=self.stored_dtype,
            empty=self.empty,
            decoder_fallback=self._decoder_fallback(prepared),
            second=self.second,
            gives_back=self._streamed_blocks > 0,
        )

    def fallbacks(self, prepared: Transformer) -> tuple[DeviceFallback, ...]:
        """What the device does without for one of this checkpoint's transformers, as far as it was tried."""
        text = prepared.text_settings
        encoder = self.text_encoder.fallback if text is None else self.trainer_parts.encoder_fallback(text)
        return known_fallbacks(self.device, self._decoder_fallback(prepared), prepared, encoder)

    def _decoder_fallback(self, prepared: Transformer) -> DeviceFallback | None:
        """None too in another dtype than the decoder was tried in, where a plain one is as it should be."""
        settings = prepared.settings
        is_tried = settings is None or self._fused_dtype(settings) == self.dtype
        return self.decoder_fallback if prepared.profile.fused and is_tried else None

    def _fused_dtype(self, settings: TrainerSettings) -> torch.dtype:
        """What `preview` computes in: float32 where the trainer did, whatever the device computes in otherwise."""
        return torch.float32 if settings.dtype == "float32" else self.dtype

    def _trainer_pipeline(
        self, prepared: Transformer, settings: TrainerSettings, context: LoadContext
    ) -> Pipeline:
        encoder = self.trainer_parts.text_encoder(settings, context)
        rounding = TORCH_DTYPES[settings.dtype]
        dtype = self._parts_dtype(prepared.profile, settings)
        like = self.fused_autoencoder if prepared.profile.fused else self.autoencoder
        tokenizer = self.trainer_parts.tokenizer
        empty = tokenizer("")
        return Pipeline(
            transformer=prepared,
            text_encoder=encoder,
            autoencoder=self.trainer_parts.autoencoder(dtype, like),
            tokenizer=tokenizer,
            latent_preview=self.latent_preview,
            device=self.device,
            dtype=dtype,
            stored_dtype=rounding,
            empty=(self.trainer_parts.empty(settings, empty.ids), empty.mask.to(self.device)),
            decoder_fallback=self._decoder_fallback(prepared),
            second=self.second,
        )

    def prepare(
        self,
        adapters: AdapterSet,
        profile: NumericsProfile,
        trainer: TrainerSettings | None = None,
        *,
        rounded: bool = True,
    ) -> Pipeline:
        """A pipeline to keep: merges adapters and quantizes, once; see `allocate`.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
        """
        prepared = self.allocate(profile, trainer, rounded=rounded)
        prepared.switch(adapters)
        return self.pipeline(prepared)


def _fits_beside(device: torch.device, plan: MemoryPlan | None, choice: MemoryChoice, size_bytes: int) -> bool:
    """Whether a text encoder can lie on the device now, and drawing still has its memory."""
    if plan is None:
        return True
    return usable_memory_bytes(device, choice.device_bytes) >= size_bytes + working_bytes(plan)
