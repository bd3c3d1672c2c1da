"""A transformer's master weights: read to where the memory plan wants them, and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.memory import pin
from chromarpc_server.pipeline.weights.reading import ReadingProgress
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsFile
from chromarpc_server.pipeline.weights.staging import tensor_hash_prefix


def read_master(
    reading: ReadingProgress, file: SafetensorsFile, device: torch.device, plan: MemoryPlan | None
) -> tuple[dict[str, Tensor], str]:
    """The transformer's weights where the plan wants them, and their hash, computed meanwhile by other threads."""
    master: dict[str, Tensor] = {}
    if plan is not None and plan.master == "device":
        hashes = {}
        for name, tensor, digest in reading.read_onto(file, device):
            master[name], hashes[name] = tensor, digest
        return master, _join_hashes(hashes)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
        digests = {}
        for name, tensor in reading.read(file):
            digests[name] = pool.submit(tensor_hash, name, tensor)
            master[name] = tensor
        revision = _join_hashes({name: digest.result() for name, digest in digests.items()})
    if plan is not None and plan.master == "host":
        master = pin(master, device)
    return master, revision


def _join_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def tensor_hash(name: str, tensor: Tensor) -> str:
    """Hash over name, dtype, shape and values, hexadecimal."""
    digest = hashlib.sha256(tensor_hash_prefix(name, tensor.dtype, tuple(tensor.shape)))
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest.update(values)
    return digest.hexdigest()
