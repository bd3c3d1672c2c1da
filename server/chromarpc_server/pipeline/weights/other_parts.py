"""Text encoder and autoencoder as their files hold them: sizes, names and codes, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.formats.autoencoder import AutoencoderPart, autoencoder_part
from chromarpc_server.pipeline.weights.formats.text_encoder import SHARED, text_encoder_part
from chromarpc_server.pipeline.weights.part import StoredPart, open_part
from chromarpc_server.pipeline.weights.reading import is_single, read_json
from chromarpc_server.pipeline.weights.shared import WeightFiles

CONFIG = "config.json"
"""Of a Hugging Face folder."""
AUTOENCODER_CONFIGS = ("vae_config.json", CONFIG)
"""What may lie beside an autoencoder's file and say what its tensors do not."""


@dataclass(frozen=True)
class StoredTextEncoder:
    """What is known of a text encoder before anything of it is read."""

    part: StoredPart = field(repr=False)
    """By Hugging Face's names, the embedding once, as `shared.weight`."""
    config: Mapping[str, object]
    """What transformers' `T5Config` is made of."""
    left_out: str
    """What else the file holds that is not read, as the end of a sentence; empty where there is nothing."""

    @property
    def vocabulary(self) -> int:
        """Pieces that it has an embedding for."""
        return self.part.recipes[SHARED].shape[0]

    @property
    def width(self) -> int:
        """Channels of what it gives to the transformer."""
        return self.part.recipes[SHARED].shape[1]

    @property
    def rounding(self) -> torch.dtype:
        """What the reference has its weights in before it quantizes them, whatever they are stored as."""
        first = self.part.recipes["encoder.block.0.layer.0.SelfAttention.q.weight"]
        return torch.float32 if first.dtype == torch.float32 and not first.widened else torch.bfloat16


@dataclass(frozen=True)
class StoredAutoencoder:
    """What is known of an autoencoder before anything of it is read."""

    part: StoredPart = field(repr=False)
    """By diffusers' names."""
    config: Mapping[str, object]
    """What diffusers' `AutoencoderKL` is made of."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent image."""
        return self.part.recipes["decoder.conv_in.weight"].shape[1]


def open_text_encoder(path: Path, files: WeightFiles) -> StoredTextEncoder:
    """A T5 v1.1 encoder with its headers checked.

    Args:
        path: a file, which may hold other parts as well, or a folder as on the Hugging Face hub.
        files: what this host's devices have open.

    Raises:
        WeightsInvalid: damaged, something else, or in a format that is not known; naming the file.
    """
    part = open_part(path, "text_encoder", files)
    found = text_encoder_part(part.recipes, path.name, _config(part, path, "d_model"))
    return StoredTextEncoder(replace(part, recipes=found.recipes), found.config, found.left_out)


def open_autoencoder(path: Path, files: WeightFiles) -> StoredAutoencoder:
    """An autoencoder of Flux's kind with its headers checked; see `open_text_encoder`."""
    part = open_part(path, "autoencoder", files)
    found = _autoencoder(part, path)
    return StoredAutoencoder(replace(part, recipes=found.recipes), found.config)


def _autoencoder(part: StoredPart, path: Path) -> AutoencoderPart:
    config = _config(part, path, "block_out_channels")
    try:
        return autoencoder_part(part.recipes, path.name, config)
    except WeightsInvalid:
        # Of sizes that are not Flux's, which a small model has. Where they are Flux's, nothing that happens to lie
        # beside the file is asked: another model's constants would draw other colours.
        if config is None:
            for beside in _configs_beside(path):
                with suppress(WeightsInvalid):
                    return autoencoder_part(part.recipes, path.name, beside)
        raise


def _config(part: StoredPart, path: Path, wanted: str) -> Mapping[str, object] | None:
    """What says a part's sizes: the folder's config.json, or a `config` in a header; None where neither is there.

    `wanted`: a key that a config of this part has; a header's may be another part's.
    """
    if not is_single(path):
        return read_json(path / CONFIG)
    for file in part.files:
        try:
            config = json.loads(file.header.metadata.get("config", "null"))
        except (ValueError, RecursionError):
            continue
        if isinstance(config, dict) and wanted in config:
            return config
    return None


def _configs_beside(path: Path) -> list[Mapping[str, object]]:
    found: list[Mapping[str, object]] = []
    for name in AUTOENCODER_CONFIGS:
        with suppress(WeightsInvalid):
            found.append(read_json(path.parent / name))
    return [config for config in found if "block_out_channels" in config]
