"""Weights from files to memory: single files and Hugging Face folders, with progress and cancellation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.progress import LoadContext, LoadProgress
from chromarpc_server.pipeline.weights.safetensors_file import (
    SafetensorsError,
    SafetensorsFile,
    open_safetensors,
)
from chromarpc_server.pipeline.weights.staging import read_onto

PAGE_BYTES = 4096


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


class ReadingProgress:
    """Counts bytes over several files and reports how far reading is."""

    def __init__(self, files: tuple[SafetensorsFile, ...], context: LoadContext) -> None:
        self._total = sum(entry.size_bytes for file in files for entry in file.tensors.values())
        self._done = 0
        self._context = context

    def read(self, file: SafetensorsFile) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one of the files.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            mapped = list(file.read())
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="read") as pool:
                # A mapped tensor's pages come one by one to whoever touches them first; here many threads do.
                touched = [pool.submit(_touch, tensor) for _, tensor in mapped]
                try:
                    for (name, tensor), touch in zip(mapped, touched, strict=True):
                        touch.result()
                        self._context.check()
                        yield name, tensor
                        self._done += file.tensors[name].size_bytes
                        self._context.progress(LoadProgress("reading", self._done, self._total))
                finally:
                    for touch in touched:
                        touch.cancel()
        except SafetensorsError as error:
            raise WeightsInvalid(f"{file.path.name}: {error}") from None

    def read_onto(self, file: SafetensorsFile, device: torch.device) -> Iterator[tuple[str, Tensor, str]]:
        """The same, on a device, each with its hash over name, dtype, shape and values.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            for name, tensor, digest in read_onto(file, device):
                self._context.check()
                yield name, tensor, digest
                self._done += file.tensors[name].size_bytes
                self._context.progress(LoadProgress("reading", self._done, self._total))
        except SafetensorsError as error:
            raise WeightsInvalid(f"{file.path.name}: {error}") from None


def _touch(tensor: Tensor) -> None:
    """Has every page of a tensor's memory read."""
    if tensor.is_contiguous() and tensor.nbytes >= PAGE_BYTES:
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].max()


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
