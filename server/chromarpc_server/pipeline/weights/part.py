"""One part of a model as its files hold it: which of their tensors it is made of, known from headers alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.formats.codes import file_recipes
from chromarpc_server.pipeline.weights.formats.prefixes import Part, part_recipes
from chromarpc_server.pipeline.weights.formats.refusals import GIVE, refuse_other
from chromarpc_server.pipeline.weights.reading import shard_paths
from chromarpc_server.pipeline.weights.shared import SharedFile, WeightFiles
from chromarpc_server.pipeline.weights.stored import Recipes, how_stored


@dataclass(frozen=True)
class StoredPart:
    """A transformer, a text encoder or an autoencoder, and where it lies."""

    files: tuple[SharedFile, ...]
    recipes: Recipes = field(repr=False)
    """By the model's names; by the files' own, without a prefix, until those are mapped."""

    @cached_property
    def pieces(self) -> frozenset[str]:
        """Names of the files' tensors that it is made of."""
        return frozenset(piece for recipe in self.recipes.values() for piece in recipe.pieces)

    @cached_property
    def wanted(self) -> Mapping[SharedFile, frozenset[str]]:
        """The same, file by file."""
        return {file: self.pieces.intersection(file.header.tensors) for file in self.files}

    @cached_property
    def size_bytes(self) -> int:
        """Of those, as they are stored."""
        return sum(file.header.tensors[name].size_bytes for file, names in self.wanted.items() for name in names)

    @cached_property
    def stored_as(self) -> str:
        """See `how_stored`."""
        return how_stored(self.recipes)

    @property
    def identity(self) -> Hashable:
        """Differs for another version of a file."""
        return tuple(file.identity for file in self.files)

    @property
    def name(self) -> str:
        """Of its first file, for people."""
        return self.files[0].header.path.name


def open_part(path: Path, part: Part, files: WeightFiles) -> StoredPart:
    """A part of a model with its headers checked, under the files' own names without a prefix.

    Args:
        path: a file, which may hold other parts as well, or a folder as on the Hugging Face hub.
        part: which it is.
        files: what this host's devices have open.

    Raises:
        WeightsInvalid: naming the file and what is wrong with it, or what else it is.
    """
    opened = tuple(files.open(shard) for shard in shard_paths(path))
    headers = [file.header for file in opened]
    shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
    metadata = {key: text for header in headers for key, text in header.metadata.items()}
    refuse_other(shapes, metadata, part, path.name)
    recipes = file_recipes(headers)
    try:
        return StoredPart(opened, part_recipes(recipes, part))
    except WeightsInvalid as error:
        raise WeightsInvalid(f"{path.name}: {error}; {GIVE[part]}") from None
