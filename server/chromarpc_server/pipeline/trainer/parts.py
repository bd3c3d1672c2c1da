"""What surrounds the transformer in the trainer: text encoder and autoencoder, in its dtype and quantizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.text_encoder import RecordedEncoder
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, multiplies_in_tf32, trainer_arithmetic
from chromarpc_server.pipeline.trainer.quantizers import QuantizedLinear, quantize_linear, require_finite
from chromarpc_server.pipeline.weights.reading import (
    CheckpointFiles,
    ReadingProgress,
    open_weights,
    read_json,
    shard_paths,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel


def _never(*_: object) -> None:
    """Nobody waits for the progress of a part, and nothing stops it."""


@torch.inference_mode()
def encode_as_trainer(model: T5EncoderModel, ids: Tensor, settings: TrainerSettings) -> Tensor:
    """Embeds all 512 tokens, padding included, without a mask, as the trainer does. (1, 512) → (1, 512, context).

    transformers 5.5, which the trainer has, computes attention by hand; on a GPU the vectors were recorded with
    5.17, whose position bias no fused kernel takes. Later versions choose otherwise, so the choice is made here.
    """
    attention = sdpa_kernel(SDPBackend.MATH) if model.device.type == "cuda" else nullcontext()
    with attention, trainer_arithmetic(model.device, settings):
        embeds: Tensor = model(input_ids=ids.to(model.device))[0]
    return embeds


@dataclass
class TrainerParts:
    """A checkpoint's text encoder and autoencoder as the trainer has them, made when first asked for.

    One text encoder is kept: that of the last settings. Belongs to the thread that owns the device.
    """

    files: CheckpointFiles
    device: torch.device
    hold_float8: bool
    keep_in_host_memory: bool
    record: bool
    _encoder_key: tuple[object, ...] | None = None
    _encoder: RecordedEncoder | None = field(repr=False, default=None)
    _empty: Tensor | None = field(repr=False, default=None)
    _autoencoders: dict[torch.dtype, AutoencoderKL] = field(repr=False, default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of what is in memory."""
        encoder = [] if self._encoder is None else list(self._encoder.model.state_dict().values())
        pixels = [tensor for model in self._autoencoders.values() for tensor in model.parameters()]
        return sum(tensor.nbytes for tensor in (*encoder, *pixels))

    def text_encoder(self, settings: TrainerSettings) -> RecordedEncoder:
        """T5 in the trainer's dtype, quantized with the transformer's quantizer where the config quantizes it.

        Raises:
            WeightsInvalid: the files cannot be used, or a weight has a row that the quantizer turns into NaN.
        """
        key = _key(settings)
        if self._encoder is None or self._encoder_key != key:
            self._encoder, self._encoder_key, self._empty = None, None, None
            self._encoder = self._build(settings.qtype if settings.quantize_te else None, settings)
            self._encoder_key = key
        return self._encoder

    def encoder_fallback(self, settings: TrainerSettings) -> DeviceFallback | None:
        """Why the text encoder of these settings is not recorded, where it should be; None while there is none."""
        return None if self._encoder is None or self._encoder_key != _key(settings) else self._encoder.fallback

    def empty(self, settings: TrainerSettings, ids: Tensor) -> Tensor:
        """Embeddings of the empty prompt: computed once for a text encoder. (1, 512) → (1, 512, context)."""
        encoder = self.text_encoder(settings)
        if self._empty is None:
            self._empty = encoder(ids)
        return self._empty

    def _build(self, qtype: str | None, settings: TrainerSettings) -> RecordedEncoder:
        dtype = TORCH_DTYPES[settings.dtype]
        files = text_encoder.open_text_encoder(self.files.text_encoder)
        reading = ReadingProgress(files, _never, _never)
        weights = {name: tensor.to(dtype) for name, tensor in text_encoder.read_all(files, reading).items()}
        finite: dict[str, Tensor] = {}

        def quantize(name: str, weight: Tensor) -> QuantizedLinear:
            quantized = quantize_linear(weight, qtype)
            finite[name] = torch.isfinite(quantized.weight).all()
            return quantized

        model = text_encoder.build_text_encoder(
            text_encoder.text_encoder_config(self.files.text_encoder),
            weights,
            device=self.device,
            dtype=dtype,
            quantize=qtype is not None,
            quantizer=quantize,
            hold_float8=self.hold_float8,
            keep_in_host_memory=self.keep_in_host_memory,
            attention="sdpa" if self.device.type == "cuda" else "eager",
        )
        require_finite(finite, qtype)
        return RecordedEncoder(model, record=self.record, run=partial(encode_as_trainer, settings=settings))

    def autoencoder(self, dtype: torch.dtype, like: AutoencoderKL) -> AutoencoderKL:
        """The autoencoder in the trainer's dtype: `like` itself where that is its own."""
        if like.dtype == dtype:
            return like
        if dtype not in self._autoencoders:
            vae_files = tuple(open_weights(path) for path in shard_paths(self.files.vae))
            self._autoencoders[dtype] = autoencoder.build_autoencoder(
                read_json(self.files.vae / "config.json"),
                text_encoder.read_all(vae_files, ReadingProgress(vae_files, _never, _never)),
                device=self.device,
                dtype=dtype,
            )
        return self._autoencoders[dtype]


def _key(settings: TrainerSettings) -> tuple[object, ...]:
    """What of the settings decides a text encoder."""
    return (settings.qtype if settings.quantize_te else None, settings.dtype, multiplies_in_tf32(settings))
