"""Where vectors of the trainer's image lie: folders are known by what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from chromarpc_server.pipeline.weights.safetensors_file import open_safetensors
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError

RUN_VECTORS = "expected.safetensors"
CPU_FILES = frozenset(
    {
        "forward.safetensors",
        "lora.safetensors",
        "lora_float32.safetensors",
        "noise.safetensors",
        "quantized.safetensors",
        "sampling.safetensors",
        "sizes.json",
        "t5.safetensors",
        "text.safetensors",
        "transformer.safetensors",
        "vae.safetensors",
    }
)
GPU_FILES = frozenset(
    {"lora.safetensors", "sampling.safetensors", "t5.safetensors", "transformer.safetensors", "vae.safetensors"}
)
TRAINER_KEY = "ai-toolkit"
"""In the header of every file that the trainer's code recorded."""


PREVIEW = "preview/"
"""How every case's name begins."""


class Kind(StrEnum):
    """What a folder holds, and how its cases' names begin."""

    CPU = "preview/cpu"
    GPU = "preview/h100"
    RUNS = "preview/runs"


@dataclass(frozen=True)
class PreviewFolder:
    """A folder of vectors of the trainer's image."""

    kind: Kind
    folder: Path

    def unknown_files(self) -> Iterator[Path]:
        """Files that are there and that no case reads."""
        if self.kind is Kind.RUNS:
            return
        known = CPU_FILES if self.kind is Kind.CPU else GPU_FILES
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.name not in known and path.suffix not in (".md", ""):
                yield path


def find_preview_folders(directory: Path) -> list[PreviewFolder]:
    """The folders below `directory` (itself, its children, and theirs below `preview`) that hold such vectors."""
    places = [directory, *_folders(directory), *_folders(directory / "preview")]
    found: list[PreviewFolder] = []
    for place in places:
        kind = _kind(place)
        if kind is not None and all(place != other.folder for other in found):
            found.append(PreviewFolder(kind, place))
    return sorted(found, key=lambda one: (list(Kind).index(one.kind), one.folder))


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _kind(folder: Path) -> Kind | None:
    if (folder / RUN_VECTORS).is_file() or any((child / RUN_VECTORS).is_file() for child in _folders(folder)):
        return Kind.RUNS
    if (folder / "quantized.safetensors").is_file() or (folder / "forward.safetensors").is_file():
        return Kind.CPU
    for name in (
        "sampling.safetensors",
        "transformer.safetensors",
        "t5.safetensors",
        "text.safetensors",
        "noise.safetensors",
    ):
        header = _header(folder / name)
        if TRAINER_KEY in header:
            return Kind.GPU if "gpu" in header else Kind.CPU
    return Kind.CPU if _are_sizes(folder / "sizes.json") else None


def _header(path: Path) -> dict[str, str]:
    """The file's metadata; empty where it is not there or cannot be read."""
    try:
        return dict(open_safetensors(path).metadata) if path.is_file() else {}
    except TensorFileError:
        return {}


def _are_sizes(path: Path) -> bool:
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (OSError, ValueError):
        return False
    return isinstance(entries, list) and bool(entries) and all("image" in entry for entry in entries)
