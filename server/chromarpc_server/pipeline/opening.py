"""A checkpoint's files with their headers checked: what they hold, and what it takes of a device's memory."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.device import model_name, usable_memory_bytes
from chromarpc_server.pipeline.host_memory import available_host_bytes
from chromarpc_server.pipeline.memory import PartSizes, plan_memory
from chromarpc_server.pipeline.models.stored_transformer import StoredTransformer, open_transformer
from chromarpc_server.pipeline.streamed import BlockSizes
from chromarpc_server.pipeline.trainer.layer import RANK_BUCKETS
from chromarpc_server.pipeline.weights.master import master_key
from chromarpc_server.pipeline.weights.other_parts import (
    StoredAutoencoder,
    StoredTextEncoder,
    open_autoencoder,
    open_text_encoder,
)
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.reading import CheckpointFiles
from chromarpc_server.pipeline.weights.shared import SharedFile, WeightFiles


@dataclass(frozen=True)
class OpenCheckpoint:
    """Of one model."""

    transformer: StoredTransformer
    text_encoder: StoredTextEncoder
    autoencoder: StoredAutoencoder

    @classmethod
    def open(cls, files: CheckpointFiles, weights: WeightFiles) -> OpenCheckpoint:
        """Looks at the headers and at nothing else.

        Args:
            files: where they lie.
            weights: what this host's devices have open.

        Raises:
            WeightsInvalid: one is damaged, or of another model, or they do not go together.
        """
        opened = cls(
            open_transformer(files.transformer, weights),
            open_text_encoder(files.text_encoder, weights),
            open_autoencoder(files.vae, weights),
        )
        opened._require_fit(files)
        return opened

    def _require_fit(self, files: CheckpointFiles) -> None:
        config = self.transformer.config
        if self.text_encoder.width != config.context_in_dim:
            raise WeightsInvalid(
                f"{files.text_encoder.name} gives {self.text_encoder.width} channels of text, and "
                f"{files.transformer.name} takes {config.context_in_dim}: they are of different models"
            )
        if 4 * self.autoencoder.latent_channels != config.in_channels:
            raise WeightsInvalid(
                f"{files.vae.name} has {self.autoencoder.latent_channels} latent channels, and "
                f"{files.transformer.name} draws {config.in_channels // 4}: they are of different models"
            )

    @property
    def parts(self) -> tuple[StoredPart, ...]:
        """In the order in which they are read."""
        return self.transformer.part, self.text_encoder.part, self.autoencoder.part

    @property
    def files(self) -> tuple[SharedFile, ...]:
        """Each once."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    def plan(
        self,
        device: torch.device,
        dtype: torch.dtype,
        choice: MemoryChoice,
        second: torch.device | None,
        weights: WeightFiles,
    ) -> MemoryPlan | None:
        """What stays where on a GPU; None for a CPU.

        Args:
            device: where pipelines will run.
            dtype: what they compute in.
            choice: what an operator decides.
            second: the other device of a pair.
            weights: what this host's devices have in page-locked memory already.

        Raises:
            OutOfMemory: the GPU or the host has too little memory for it.
        """
        if device.type != "cuda":
            return None
        usable = usable_memory_bytes(device, choice.device_bytes)
        others = None if second is None else usable_memory_bytes(second, choice.device_bytes)
        host = available_host_bytes()
        if host is not None:
            host += weights.pinned_bytes(master_key(self.transformer.part))
            host += weights.pinned_bytes(self.text_encoder_key(device, dtype))
        return plan_memory(usable, self.sizes(dtype), choice, second_bytes=others, host_bytes=host)

    def text_encoder_key(self, device: torch.device, dtype: torch.dtype) -> Hashable:
        """Of its layers in page-locked memory, once they were quantized on a device of this model."""
        return "text encoder", self.text_encoder.part.identity, dtype, model_name(device)

    def sizes(self, dtype: torch.dtype) -> PartSizes:
        """Of the parts as they could be held, to compute in this dtype."""
        wide = dtype.itemsize
        transformer, encoder = self.transformer.part.recipes, self.text_encoder.part.recipes
        float8 = sum(
            math.prod(recipe.shape) * (1 if "_blocks." in name and len(recipe.shape) > 1 else wide)
            for name, recipe in transformer.items()
        )
        text = sum(
            math.prod(recipe.shape) * (1 if ".block." in name and len(recipe.shape) > 1 else wide)
            for name, recipe in encoder.items()
        )
        sides = sum(sum(recipe.shape) for recipe in transformer.values() if len(recipe.shape) == 2)
        return PartSizes(
            master=self.transformer.part.size_bytes,
            dequantized=sum(math.prod(recipe.shape) * wide for recipe in transformer.values()),
            float8=float8,
            text_encoder=text,
            autoencoder=sum(math.prod(recipe.shape) * wide for recipe in self.autoencoder.part.recipes.values()),
            beside=sides * RANK_BUCKETS[0] * wide,
            blocks=BlockSizes.of({name: recipe.shape for name, recipe in transformer.items()}),
        )

    def text_encoder_onto(self, device: torch.device, plan: MemoryPlan | None) -> torch.device | None:
        """The device, where the text encoder fits there as it is stored beside everything else; else None."""
        if plan is None:
            return None
        return device if plan.usable_bytes - plan.estimated_bytes > self.text_encoder.part.size_bytes else None
