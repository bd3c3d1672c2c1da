"""A transformer's master weights: read to where the memory plan wants them, and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.shared import HostWeights, SharedFile, WeightFiles
from chromarpc_server.pipeline.weights.staging import tensor_hash_prefix


def read_master(
    reading: ReadingProgress,
    file: SharedFile,
    files: WeightFiles,
    device: torch.device,
    plan: MemoryPlan | None,
) -> tuple[Mapping[str, Tensor], str]:
    """The transformer's weights where the plan wants them, and their hash, which is computed once for a file.

    Args:
        reading: reports how far it is; checked between tensors, and while another device reads.
        file: the transformer.
        files: what devices have in common, page-locked masters among them.
        device: what asks.
        plan: where the weights are to lie; None for a CPU, which has them mapped.
    """
    if plan is not None and plan.master == "device":
        return _onto_device(reading, file, device)
    if plan is None:
        return _mapped(reading, file)
    made = False

    def make(note_progress: Callable[[], None]) -> Mapping[str, Tensor]:
        nonlocal made
        made, reading.note_progress = True, note_progress
        return _mapped(reading, file)[0]

    master = files.pinned(("master", file.identity), device, make, reading.check)
    if not made:
        reading.skip(file)
    if file.revision is None:
        file.revision = _join_hashes({name: tensor_hash(name, tensor) for name, tensor in master.items()})
    return master, file.revision


def _onto_device(
    reading: ReadingProgress, file: SharedFile, device: torch.device
) -> tuple[Mapping[str, Tensor], str]:
    master: dict[str, Tensor] = {}
    with file.reading(reading.check):
        revision, hashes = file.revision, {}
        for name, tensor, digest in reading.read_onto(file, device, hashed=revision is None):
            master[name], hashes[name] = tensor, digest
        if revision is None:
            file.revision = revision = _join_hashes(hashes)
    return master, revision


def _mapped(reading: ReadingProgress, file: SharedFile) -> tuple[HostWeights, str]:
    with file.reading(reading.check):
        if file.revision is not None:
            for _ in reading.read(file):
                pass
            return reading.mapped[-1], file.revision
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
            digests = {name: pool.submit(tensor_hash, name, tensor) for name, tensor in reading.read(file)}
            file.revision = revision = _join_hashes({name: digest.result() for name, digest in digests.items()})
        return reading.mapped[-1], revision


def _join_hashes(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def tensor_hash(name: str, tensor: Tensor) -> str:
    """Hash over name, dtype, shape and values, hexadecimal."""
    digest = hashlib.sha256(tensor_hash_prefix(name, tensor.dtype, tuple(tensor.shape)))
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest.update(values)
    return digest.hexdigest()
