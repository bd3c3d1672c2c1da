"""A checkpoint's transformer as its files hold it: sizes, native names and codes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.weights.formats.transformer import CONFIG, config_text, transformer_recipes
from chromarpc_server.pipeline.weights.part import StoredPart, open_part
from chromarpc_server.pipeline.weights.reading import is_single, read_json, require_same_keys
from chromarpc_server.pipeline.weights.shared import WeightFiles


@dataclass(frozen=True)
class StoredTransformer:
    """What is known of a transformer before anything of it is read."""

    config: ChromaConfig
    part: StoredPart = field(repr=False)
    """Under native names: all of the model's parameters and nothing else."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return {name: recipe.shape for name, recipe in self.part.recipes.items()}


def open_transformer(path: Path, files: WeightFiles) -> StoredTransformer:
    """A transformer with its headers checked.

    Args:
        path: a file, which may hold other parts as well, or a diffusers folder.
        files: what this host's devices have open.

    Raises:
        WeightsInvalid: damaged, another model, or in a format that is not known; naming the file.
    """
    part = open_part(path, "transformer", files)
    config_path = path / "config.json"
    folder_config = read_json(config_path) if not is_single(path) and config_path.is_file() else None
    metadata = {key: text for file in reversed(part.files) for key, text in file.header.metadata.items()}
    sizes = config_text(metadata, folder_config)
    try:
        part = replace(part, recipes=transformer_recipes(part.recipes))
        transformer = StoredTransformer(
            ChromaConfig.from_shapes(
                {name: recipe.shape for name, recipe in part.recipes.items()},
                {} if sizes is None else {CONFIG: sizes},
            ),
            part,
        )
    except WeightsInvalid as error:
        raise WeightsInvalid(f"{path.name}: {error}") from None
    _require_parameters(transformer, path.name)
    return transformer


@lru_cache(8)
def _parameters(config: ChromaConfig) -> Mapping[str, tuple[int, ...]]:
    """Name to shape; kept, since a folder may hold hundreds of checkpoints of the same sizes."""
    with torch.device("meta"):
        expected = ChromaTransformer(config).state_dict()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in expected.items()})


def _require_parameters(transformer: StoredTransformer, name: str) -> None:
    expected = _parameters(transformer.config)
    recipes = transformer.part.recipes
    require_same_keys(expected, recipes, name)
    for parameter, recipe in recipes.items():
        if recipe.shape != expected[parameter] or not recipe.dtype.is_floating_point:
            raise WeightsInvalid(
                f"{name}: {parameter} is {recipe.stored_as} {list(recipe.shape)}, "
                f"and should be numbers {list(expected[parameter])}"
            )
