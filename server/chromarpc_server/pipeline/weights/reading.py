"""Where a model's files lie, single or in Hugging Face folders, and what their headers have to say."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.models import FILE_SUFFIXES
from chromarpc_server.pipeline.bundled import t5_tokenizer_folder
from chromarpc_server.pipeline.weights.gguf_file import MAGIC, open_gguf
from chromarpc_server.pipeline.weights.safetensors_file import open_safetensors
from chromarpc_server.pipeline.weights.tensor_file import TensorFile, TensorFileError, open_regular, shown_few

SENTENCEPIECE_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
"""Of T5's own spiece.model, which folders written by older libraries have: the pieces of the bundled tokenizer."""


@dataclass(frozen=True)
class CheckpointFiles:
    """Where a model's parts lie. Each is a file, or a folder laid out as on the Hugging Face hub; one file may be
    several parts.
    """

    transformer: Path
    """A file, or a folder of safetensors, sharded or not."""
    text_encoder: Path
    """A file, or a folder with config.json and model safetensors, sharded or not."""
    tokenizer: Path
    """tokenizer.json, or the folder that it is in; T5's own spiece.model stands for it: see `tokenizer_file`."""
    vae: Path
    """A file, or a folder with config.json and diffusion_pytorch_model safetensors, sharded or not."""
    preview: Path | None = None
    """Linear latent → RGB map of this model's VAE; the Flux VAE's where there is none."""
    base_name: str = ""
    """What adapters trained on this model name as their base; empty where nobody says."""

    def missing(self) -> tuple[Path, ...]:
        """Files that are not there."""
        wanted = [tokenizer_file(self.tokenizer)]
        wanted += [part / "config.json" for part in (self.text_encoder, self.vae) if not is_single(part)]
        missing = [path for path in wanted if not path.is_file()]
        for part in (self.transformer, self.text_encoder, self.vae):
            try:
                shards = shard_paths(part)
            except WeightsInvalid:
                missing.append(part)
                continue
            missing += [path for path in shards if not path.is_file()]
        return tuple(missing)


def is_single(part: Path) -> bool:
    """Whether a part of a model is one file: as it is there, or else as its name says."""
    return part.is_file() or (part.suffix.lower() in FILE_SUFFIXES and not part.is_dir())


def in_folder(part: Path, name: str) -> Path:
    """A file of this name in a part's folder; the part itself where it is one file."""
    return part if is_single(part) else part / name


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json of a file or folder; of a folder that has T5's spiece.model instead, the bundled one."""
    path = in_folder(place, "tokenizer.json")
    pieces = place / "spiece.model"
    if path.is_file() or not pieces.is_file():
        return path
    digest = hashlib.sha256(pieces.read_bytes()).hexdigest()
    return t5_tokenizer_folder() / "tokenizer.json" if digest == SENTENCEPIECE_SHA256 else path


def shard_paths(part: Path) -> tuple[Path, ...]:
    """The files that a part's tensors are in, in order: the part itself, or those of a Hugging Face folder.

    Raises:
        WeightsInvalid: the folder has none, or an index that cannot be used.
    """
    if is_single(part):
        return (part,)
    indexes = sorted(part.glob("*.safetensors.index.json"))
    if indexes:
        found = read_json(indexes[0]).get("weight_map")
        names = list(found.values()) if isinstance(found, dict) else []
        if not names or any(not isinstance(name, str) or "/" in name or "\0" in name for name in names):
            raise WeightsInvalid(f"{indexes[0].name} names no shards")
        return tuple(part / name for name in sorted(set(names)))
    single = sorted(part.glob("*.safetensors")) or sorted(part.glob("*.gguf"))
    if not single:
        raise WeightsInvalid(f"{part.name} has no safetensors file")
    shard = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\..*)", single[0].name)
    if shard is None:
        return (single[0],)
    return tuple(
        part / f"{shard[1]}-{number:05}-of-{shard[2]}{shard[3]}" for number in range(1, int(shard[2]) + 1)
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        WeightsInvalid: not there, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise WeightsInvalid(f"{path.name} cannot be read as JSON") from None
    if not isinstance(value, dict):
        raise WeightsInvalid(f"{path.name} is not a JSON object")
    return value


def open_weights(path: Path) -> TensorFile:
    """A file of weights with its header checked; what format it is in says its content, not its name.

    Raises:
        WeightsInvalid: naming the file and what is wrong with it.
    """
    try:
        with open_regular(path) as stream:
            is_gguf = stream.read(len(MAGIC)) == MAGIC
        return open_gguf(path) if is_gguf else open_safetensors(path)
    except TensorFileError as error:
        raise WeightsInvalid(f"{path.name}: {error}") from None
    except OSError as error:
        raise WeightsInvalid(f"{path.name}: cannot be read: {error.strerror}") from None


def require_same_keys(expected: Mapping[str, object], found: Mapping[str, object], name: str) -> None:
    """Refuses weights that lack a tensor or bring one too many.

    Raises:
        WeightsInvalid: naming the first few.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        raise WeightsInvalid(
            f"{name}: {len(missing)} tensors missing {shown_few(missing)}, "
            f"{len(surplus)} unknown {shown_few(surplus)}"
        )
