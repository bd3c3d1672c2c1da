"""What a file or folder is as a part of a model, from headers alone.

Looked at once for every version of a file: a folder with hundreds of checkpoints is gone through at a start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.models import ModelPart
from chromarpc_server.pipeline.models.stored_transformer import open_transformer
from chromarpc_server.pipeline.weights.formats.prefixes import Part as PartName
from chromarpc_server.pipeline.weights.formats.prefixes import part_prefix
from chromarpc_server.pipeline.weights.other_parts import open_autoencoder, open_text_encoder
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.reading import read_json, shard_paths, tokenizer_file
from chromarpc_server.pipeline.weights.shared import Identity, WeightFiles, file_identity
from chromarpc_server.pipeline.weights.tensor_file import TensorFile

MAX_KEPT = 4096
"""Versions of files that are remembered."""
_NAMES: Mapping[ModelPart, PartName] = {
    ModelPart.TEXT_ENCODER: "text_encoder",
    ModelPart.AUTOENCODER: "autoencoder",
}


@dataclass(frozen=True)
class PartFacts:
    """What headers say of a part."""

    stored_as: str = ""
    """How most of its weights are stored, such as `bf16` or `GGUF Q4_K`; empty of a tokenizer."""
    size_bytes: int = 0
    """As it is stored."""
    text_width: int | None = None
    """Channels of the text that a transformer takes and a text encoder gives."""
    vocabulary: int | None = None
    """Of a text encoder: pieces that it has an embedding for."""
    holds: frozenset[ModelPart] = frozenset()
    """Of a transformer's file: which other parts are inside."""
    fingerprint: str = ""
    """Hash over everything but the values of tensors, hexadecimal: another file or format differs."""
    problem: str = ""
    """Why it cannot be this part; empty where it can."""


def part_facts(path: Path, part: ModelPart) -> PartFacts:
    """What a file or folder is as this part. Touches the disk."""
    try:
        shards = shard_paths(path) if part is not ModelPart.TOKENIZER else (tokenizer_file(path),)
        found = (path, *shards) if path.is_dir() else shards
        version = tuple(file_identity(each.stat()) for each in found)
    except WeightsInvalid as error:
        return PartFacts(problem=_without_name(path, error))
    except OSError as error:
        return PartFacts(problem=f"cannot be read: {error.strerror}")
    return _facts(path, shards, part, version)


@lru_cache(MAX_KEPT)
def _facts(
    path: Path,
    shards: tuple[Path, ...],
    part: ModelPart,
    version: tuple[Identity, ...],  # noqa: ARG001 - another one is looked at again
) -> PartFacts:
    try:
        return _READERS[part](path, shards)
    except WeightsInvalid as error:
        return PartFacts(problem=_without_name(path, error))
    except OSError as error:
        return PartFacts(problem=f"cannot be read: {error.strerror}")


def _without_name(path: Path, error: WeightsInvalid) -> str:
    """What is wrong with a file, for places that name it themselves."""
    return error.message.removeprefix(f"{path.name}: ")


def _transformer(path: Path, shards: tuple[Path, ...]) -> PartFacts:
    files = WeightFiles()
    held = [files.open(shard) for shard in shards]
    found = open_transformer(path, files)
    names = [name for file in held for name in file.header.tensors]
    inside = frozenset(part for part, name in _NAMES.items() if part_prefix(names, name))
    return replace(_of(path, found.part), text_width=found.config.context_in_dim, holds=inside)


def _text_encoder(path: Path, _: tuple[Path, ...]) -> PartFacts:
    found = open_text_encoder(path, WeightFiles())
    return replace(_of(path, found.part), text_width=found.width, vocabulary=found.vocabulary)


def _autoencoder(path: Path, _: tuple[Path, ...]) -> PartFacts:
    return _of(path, open_autoencoder(path, WeightFiles()).part)


def _of(path: Path, part: StoredPart) -> PartFacts:
    headers = [file.header for file in part.files]
    return PartFacts(part.stored_as, part.size_bytes, fingerprint=_fingerprint(path, headers))


def _tokenizer(_: Path, shards: tuple[Path, ...]) -> PartFacts:
    read_json(shards[0])
    return PartFacts(fingerprint=hashlib.sha256(shards[0].read_bytes()).hexdigest())


_READERS: dict[ModelPart, Callable[[Path, tuple[Path, ...]], PartFacts]] = {
    ModelPart.TRANSFORMER: _transformer,
    ModelPart.TEXT_ENCODER: _text_encoder,
    ModelPart.TOKENIZER: _tokenizer,
    ModelPart.AUTOENCODER: _autoencoder,
}


def _fingerprint(path: Path, files: Sequence[TensorFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        entries = sorted((name, entry.dtype, *entry.shape, entry.begin) for name, entry in file.tensors.items())
        digest.update(json.dumps([file.size_bytes, entries, dict(sorted(file.metadata.items()))]).encode())
    config = path / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    return digest.hexdigest()
