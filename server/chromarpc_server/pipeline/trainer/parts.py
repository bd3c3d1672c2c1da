"""What surrounds the transformer in the trainer: text encoder and autoencoder, in its dtype and quantizer."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.device import model_name
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.text_encoder import RecordedEncoder, Tokenizer, UnfusedAttention
from chromarpc_server.pipeline.progress import SILENT, Check, LoadContext, LoadProgress
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, multiplies_in_tf32, trainer_arithmetic
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.other_parts import open_autoencoder, open_text_encoder
from chromarpc_server.pipeline.weights.quantizers import (
    FLOAT8_QTYPES,
    QuantizedLinear,
    quantize_linear,
    require_finite,
)
from chromarpc_server.pipeline.weights.reading import CheckpointFiles
from chromarpc_server.pipeline.weights.shared import WeightFiles

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

log = logging.getLogger(__name__)


@torch.inference_mode()
def encode_as_trainer(model: T5EncoderModel, ids: Tensor, settings: TrainerSettings) -> Tensor:
    """Embeds all 512 tokens, padding included, without a mask, as the trainer does. (1, 512) → (1, 512, context).

    transformers 5.5, which the trainer has, computes attention by hand; on a GPU the vectors were recorded with
    5.17, whose position bias no fused kernel takes. Later versions choose otherwise, so the choice is made here.
    """
    attention = UnfusedAttention() if model.device.type == "cuda" else nullcontext()
    with attention, trainer_arithmetic(model.device, settings):
        embeds: Tensor = model(input_ids=ids.to(model.device))[0]
    return embeds


EncoderKey = tuple[str | None, str, bool]
"""What of the settings decides a text encoder: its quantizer, dtype, and the precision of float32 products."""


def encoder_key(settings: TrainerSettings) -> EncoderKey:
    """Which text encoder these settings take."""
    return settings.qtype if settings.quantize_te else None, settings.dtype, multiplies_in_tf32(settings)


@dataclass
class _KeptEncoder:
    """A text encoder, and the empty prompt's embeddings once they were asked for."""

    encoder: RecordedEncoder
    size_bytes: int
    """On the device."""
    empty: Tensor | None = field(repr=False, default=None)


@dataclass
class TrainerParts:
    """A checkpoint's text encoders and autoencoders as the trainer has them, each made when first asked for.

    The owner of the device's memory decides how many text encoders stay, by `drop_idle`. Belongs to the thread
    that owns the device.
    """

    files: CheckpointFiles
    device: torch.device
    hold_float8: bool
    keep_in_host_memory: bool
    record: bool
    fits: Callable[[int], bool] = field(repr=False, default=lambda _: True)
    """Whether this many bytes more can lie on the device; a text encoder for which they cannot stays in host
    memory, and is copied over layer by layer."""
    weights: WeightFiles = field(repr=False, default_factory=WeightFiles)
    """What this host's devices have in common."""
    _encoders: OrderedDict[EncoderKey, _KeptEncoder] = field(repr=False, default_factory=OrderedDict)
    """Least recently used first."""
    _autoencoders: dict[torch.dtype, AutoencoderKL] = field(repr=False, default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of what is on the device."""
        encoders = sum(kept.size_bytes for kept in self._encoders.values())
        pixels = (tensor for model in self._autoencoders.values() for tensor in model.parameters())
        return encoders + sum(int(tensor.nbytes) for tensor in pixels)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """As the trainer has it."""
        return Tokenizer(self.files.tokenizer, as_trainer=True)

    @property
    def encoder_count(self) -> int:
        """Text encoders that are kept."""
        return len(self._encoders)

    def missing_bytes(self, settings: TrainerSettings, dtype: torch.dtype, like: torch.dtype) -> int:
        """What a pipeline of these settings takes on the device beside what is there.

        Args:
            settings: decide the text encoder.
            dtype: of the autoencoder.
            like: of the autoencoder that the checkpoint has itself.
        """
        missing = 0 if encoder_key(settings) in self._encoders else self._encoder_bytes(settings)
        if dtype not in (like, *self._autoencoders):
            pixels = open_autoencoder(self.files.vae, self.weights).part
            elements = sum(math.prod(recipe.shape) for recipe in pixels.recipes.values())
            missing += elements * dtype.itemsize
        return missing

    def idle_bytes(self, needed: Collection[TrainerSettings]) -> int:
        """Of the text encoders on the device that no settings in `needed` take."""
        taken = {encoder_key(settings) for settings in needed}
        return sum(kept.size_bytes for key, kept in self._encoders.items() if key not in taken)

    def drop_idle(self, needed: Collection[TrainerSettings]) -> bool:
        """Drops the least recently used text encoder among those that no settings in `needed` take.

        Returns whether there was one.
        """
        taken = {encoder_key(settings) for settings in needed}
        idle = next((key for key in self._encoders if key not in taken), None)
        if idle is None:
            return False
        del self._encoders[idle]
        log.info("trainer.text_encoder_dropped", extra={"qtype": idle[0] or "none", "dtype": idle[1]})
        return True

    def text_encoder(self, settings: TrainerSettings, context: LoadContext = SILENT) -> RecordedEncoder:
        """T5 in the trainer's dtype, quantized with the transformer's quantizer where the config quantizes it.

        Args:
            settings: what the trainer's config says.
            context: reports reading and quantizing, where it is not there yet; checked between tensors.

        Raises:
            WeightsInvalid: the files cannot be used, or a weight has a row that the quantizer turns into NaN.
        """
        key = encoder_key(settings)
        if key not in self._encoders:
            began = time.monotonic()
            on_host = self.keep_in_host_memory or not self.fits(self._encoder_bytes(settings))
            encoder = self._build(key[0], settings, on_host, context)
            self._encoders[key] = kept = _KeptEncoder(encoder, _device_bytes(encoder, self.device))
            fields = {"qtype": key[0] or "none", "dtype": key[1], "place": "host" if on_host else "device"}
            seconds = round(time.monotonic() - began, 2)
            log.info("trainer.text_encoder", extra={**fields, "bytes": kept.size_bytes, "seconds": seconds})
        self._encoders.move_to_end(key)
        return self._encoders[key].encoder

    def encoder_fallback(self, settings: TrainerSettings) -> DeviceFallback | None:
        """Why the text encoder of these settings is not recorded, where it should be; None while there is none."""
        kept = self._encoders.get(encoder_key(settings))
        return None if kept is None else kept.encoder.fallback

    def empty(self, settings: TrainerSettings, ids: Tensor) -> Tensor:
        """Embeddings of the empty prompt: computed once for a text encoder. (1, 512) → (1, 512, context)."""
        encoder = self.text_encoder(settings)
        kept = self._encoders[encoder_key(settings)]
        if kept.empty is None:
            kept.empty = encoder(ids)
        return kept.empty

    def _encoder_bytes(self, settings: TrainerSettings) -> int:
        """What a text encoder of these settings takes on the device, from its files' headers."""
        wide = TORCH_DTYPES[settings.dtype].itemsize
        float8 = self.hold_float8 and settings.quantize_te and settings.qtype in FLOAT8_QTYPES
        total = 0
        part = open_text_encoder(self.files.text_encoder, self.weights).part
        for name, recipe in part.recipes.items():
            in_block = ".block." in name
            if in_block and self.keep_in_host_memory:
                continue
            elements = math.prod(recipe.shape)
            in_float8 = float8 and in_block and len(recipe.shape) > 1
            total += elements + recipe.shape[0] * wide if in_float8 else elements * wide
        return total

    def _build(
        self, qtype: str | None, settings: TrainerSettings, on_host: bool, context: LoadContext
    ) -> RecordedEncoder:
        dtype = TORCH_DTYPES[settings.dtype]
        opened = open_text_encoder(self.files.text_encoder, self.weights)
        weights = ReadingProgress((opened.part,), context).stored(opened.part)
        total, done = sum(stored.numel() * dtype.itemsize for stored in weights.values()), 0
        finite: dict[str, Tensor] = {}

        def quantize(name: str, weight: Tensor) -> QuantizedLinear:
            nonlocal done
            context.check()
            held = weight.to(dtype)
            quantized = quantize_linear(held, qtype)
            finite[name] = torch.isfinite(quantized.weight).all()
            done += held.nbytes
            context.progress(LoadProgress("quantizing", done, total))
            return quantized

        model = text_encoder.build_text_encoder(
            text_encoder.text_encoder_config(opened.config),
            weights,
            device=self.device,
            dtype=dtype,
            quantize=qtype is not None,
            quantizer=quantize,
            hold_float8=self.hold_float8,
            keep_in_host_memory=on_host,
            pinned=partial(self._pinned, (encoder_key(settings), opened.part.identity), context.check),
            attention="sdpa" if self.device.type == "cuda" else "eager",
        )
        require_finite(finite, qtype)
        if qtype is not None:
            context.progress(LoadProgress("quantizing", total, total))
        record = self.record and not on_host
        return RecordedEncoder(model, record=record, run=partial(encode_as_trainer, settings=settings))

    def _pinned(self, key: Hashable, check: Check, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Page-locked: those of a device of the same model, where it has made them."""
        alike = ("trainer", self.hold_float8, model_name(self.device), key)
        return self.weights.pinned(alike, self.device, lambda _: tensors, check)

    def autoencoder(self, dtype: torch.dtype, like: AutoencoderKL) -> AutoencoderKL:
        """The autoencoder in the trainer's dtype: `like` itself where that is its own."""
        if like.dtype == dtype:
            return like
        if dtype not in self._autoencoders:
            opened = open_autoencoder(self.files.vae, self.weights)
            self._autoencoders[dtype] = autoencoder.build_autoencoder(
                opened.config,
                ReadingProgress((opened.part,), SILENT).stored(opened.part),
                device=self.device,
                dtype=dtype,
            )
        return self._autoencoders[dtype]


def _device_bytes(encoder: RecordedEncoder, device: torch.device) -> int:
    """Of the tensors that lie on the device, the shared embedding once."""
    tensors = {
        tensor.data_ptr(): tensor
        for tensor in encoder.model.state_dict().values()
        if tensor.device.type == device.type
    }
    return sum(tensor.nbytes for tensor in tensors.values())
