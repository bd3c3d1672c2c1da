"""Libraries over folders of a test's own, and small adapters to put into them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.root import AdapterRoot
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.adapters.uploads.registry import UploadRegistry
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.limits import UploadLimits

LIMITS = UploadLimits(max_file_bytes=4000, max_total_bytes=6000, max_chunk_bytes=1000, max_open=2, expiry_s=60)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def open_library(
    root: Path | None,
    data_dir: Path,
    limits: UploadLimits | None = None,
    *,
    downloads: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
    room: DiskRoom | None = None,
) -> AdapterLibrary:
    """A library as a server has it; its `downloads` lie in `data_dir` unless another folder is given."""
    uploaded = ContentStore(data_dir / "loras", LoraSource.UPLOAD, data_dir / "uploads")
    downloaded = ContentStore(downloads or data_dir / "downloads", LoraSource.DOWNLOAD)
    uploads = UploadRegistry(uploaded, limits, room=room, clock=clock, wall_clock=wall_clock)
    return AdapterLibrary(AdapterRoot(root), uploads, downloaded)


def adapter_bytes(seed: int = 0) -> bytes:
    """A small adapter file, different for each seed."""
    return save(
        {
            "diffusion_model.img_in.lora_A.weight": torch.full((2, 4), float(seed)),
            "diffusion_model.img_in.lora_B.weight": torch.ones(8, 2),
        }
    )


def flip_a_bit(file: Path, at: int = -1) -> None:
    """As a disk does that loses bits: neither size nor time changes."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def upload(library: AdapterLibrary, data: bytes, filename: str = "a.safetensors", chunk: int = 100) -> StoredLora:
    state = library.uploads.create(filename, len(data))
    for offset in range(0, len(data), chunk):
        assert library.uploads.append(state.upload_id, offset, data[offset : offset + chunk]).next_offset > offset
    return library.uploads.finalize(state.upload_id, sha256_of(data))


def parts(tmp_path: Path) -> list[str]:
    """Files of unfinished uploads."""
    return sorted(path.name for path in (tmp_path / "data" / "uploads").glob("*/*.part"))


def paths(library: AdapterLibrary) -> list[str]:
    return [lora.path for lora in library.listing().loras]
