"""A ComfyUI `models` folder of chroma-mini's parts, as people have theirs: single files, links."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

MINI = Path(str(resources.files("chromarpc_server"))) / "assets" / "chroma_mini"
TRANSFORMER = MINI / "chroma-mini.safetensors"
TEXT_ENCODER = MINI / "text_encoder_2" / "model.safetensors"
AUTOENCODER = MINI / "vae" / "diffusion_pytorch_model.safetensors"
KINDS = ("checkpoints", "clip", "diffusion_models", "loras", "text_encoders", "unet", "vae")


def write_comfyui_folder(folder: Path, transformer: str = "My Chroma v2.safetensors") -> Path:
    """Makes the folders, a transformer of this name, its text encoder and its autoencoder."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
    (folder / "diffusion_models" / transformer).symlink_to(TRANSFORMER)
    (folder / "text_encoders" / "t5xxl_mini.safetensors").symlink_to(TEXT_ENCODER)
    shutil.copy(AUTOENCODER, folder / "vae" / "ae.safetensors")
    # Of sizes that are not Flux's, which no tensor shows.
    shutil.copy(MINI / "vae" / "config.json", folder / "vae" / "config.json")
    return folder


def write_header(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of bf16 zeros that take no room on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, size = end, 2
        for side in shape:
            size *= side
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Of a safetensors file's tensors."""
    return {name: entry["shape"] for name, entry in _header(path).items() if name != "__metadata__"}


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file's header says besides."""
    return dict(_header(path).get("__metadata__", {}))


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(size)))
