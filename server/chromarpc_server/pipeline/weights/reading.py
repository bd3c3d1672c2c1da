"""Where a model's files lie, single or in Hugging Face folders, and what their headers have to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.safetensors_file import (
    SafetensorsError,
    SafetensorsFile,
    open_safetensors,
)


@dataclass(frozen=True)
class CheckpointFiles:
    """Where a model's files lie; the folders are laid out as on the Hugging Face hub."""

    transformer: Path
    """One safetensors file with native keys."""
    text_encoder: Path
    """config.json and model safetensors, sharded or not."""
    tokenizer: Path
    """tokenizer.json."""
    vae: Path
    """config.json and diffusion_pytorch_model safetensors, sharded or not."""
    preview: Path | None = None
    """Linear latent → RGB map of this model's VAE; the Flux VAE's where there is none."""
    base_name: str = ""
    """What adapters trained on this model name as their base; empty where nobody says."""

    def missing(self) -> tuple[Path, ...]:
        """Files that are not there."""
        wanted = [
            self.transformer,
            self.text_encoder / "config.json",
            self.tokenizer / "tokenizer.json",
            self.vae / "config.json",
        ]
        missing = [path for path in wanted if not path.is_file()]
        for folder in (self.text_encoder, self.vae):
            try:
                shards = shard_paths(folder)
            except WeightsInvalid:
                missing.append(folder)
                continue
            missing += [path for path in shards if not path.is_file()]
        return tuple(missing)


def shard_paths(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face folder, in order.

    Raises:
        WeightsInvalid: the folder has none, or an index that cannot be used.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = read_json(indexes[0]).get("weight_map", {})
        files = sorted(set(names.values())) if isinstance(names, dict) else []
        if not files or any(not isinstance(name, str) or "/" in name for name in files):
            raise WeightsInvalid(f"{indexes[0].name} names no shards")
        return tuple(folder / name for name in files)
    single = sorted(folder.glob("*.safetensors"))
    if not single:
        raise WeightsInvalid(f"{folder.name} has no safetensors file")
    return (single[0],)


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


def open_weights(path: Path) -> SafetensorsFile:
    """A checkpoint file with its header checked.

    Raises:
        WeightsInvalid: naming the file and what is wrong with it.
    """
    try:
        return open_safetensors(path)
    except SafetensorsError as error:
        raise WeightsInvalid(f"{path.name}: {error}") from None


def require_same_keys(expected: Mapping[str, object], found: Mapping[str, object], name: str) -> None:
    """Refuses weights that lack a tensor or bring one too many.

    Raises:
        WeightsInvalid: naming the first few.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        raise WeightsInvalid(
            f"{name}: {len(missing)} tensors missing {missing[:3]}, {len(surplus)} unknown {surplus[:3]}"
        )
