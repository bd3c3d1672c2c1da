"""Recorded vectors: files of numbered cases, with weights and configs beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.models.autoencoder import build_autoencoder
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.text_encoder import build_text_encoder
from chromarpc_server.pipeline.weights.safetensors_file import open_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel


@dataclass(frozen=True)
class Vectors:
    """One file: tensors and header metadata."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Vectors:
        """Reads a whole file.

        Raises:
            SafetensorsError: it cannot be used.
        """
        file = open_safetensors(path)
        return cls(dict(file.read()), file.metadata)

    def cases(self) -> list[str]:
        """The numbers that tensors' names begin with, in order."""
        found = {name.split(".", 1)[0] for name in self.tensors}
        return sorted((name for name in found if name.isdigit()), key=int)

    def of(self, case: str) -> dict[str, Tensor]:
        """One case's tensors, without its number."""
        prefix = f"{case}."
        return {
            name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)
        }

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    @property
    def config(self) -> dict[str, object]:
        """The header's `config`."""
        value = json.loads(self.metadata["config"])
        if not isinstance(value, dict):
            raise TypeError("the header's config is not an object")
        return value

    def chroma_config(self) -> ChromaConfig:
        """Sizes of the transformer whose weights these are."""
        return ChromaConfig.from_shapes(
            {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}, self.metadata
        )

    def text_encoder(
        self, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype, *, quantize: bool
    ) -> T5EncoderModel:
        """The encoder of these weights and this file's config."""
        config = libraries().t5_config(**self.config)
        return build_text_encoder(config, weights, device=device, dtype=dtype, quantize=quantize)

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder of this file."""
        return build_autoencoder(self.config, dict(self.tensors), device=device, dtype=dtype)


def files(folder: Path, *names: str) -> Iterator[Path]:
    """Those of the named files that are there."""
    for name in names:
        if (folder / name).is_file():
            yield folder / name
