"""A transformer's master weights as they are stored: read to where the memory plan wants them, and hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.shared import HostWeights, WeightFiles
from chromarpc_server.pipeline.weights.staging import tensor_hash_prefix
from chromarpc_server.pipeline.weights.stored import StoredWeights


def read_master(
    reading: ReadingProgress,
    part: StoredPart,
    files: WeightFiles,
    device: torch.device,
    plan: MemoryPlan | None,
) -> tuple[StoredWeights, str]:
    """The transformer's weights where the plan wants them, and their hash, which is computed once for a file.

    Args:
        reading: reports how far it is; checked between tensors, and while another device reads.
        part: the transformer.
        files: what devices have in common, page-locked masters among them.
        device: what asks.
        plan: where the weights are to lie; None for a CPU, which has them mapped.
    """
    if plan is not None and plan.master == "device":
        pieces: Mapping[str, Tensor] = _onto_device(reading, part, device)
    elif plan is None or plan.master == "mapped":
        pieces = _mapped(reading, part)
    else:
        pieces = _pinned(reading, part, files, device)
    return StoredWeights(part.recipes, pieces), _revision(part)


def master_key(part: StoredPart) -> Hashable:
    """Of a transformer in page-locked memory: parts of one file lie in pieces of their own."""
    return "master", part.identity, part.pieces


def _pinned(reading: ReadingProgress, part: StoredPart, files: WeightFiles, device: torch.device) -> HostWeights:
    made = False

    def make(note_progress: Callable[[], None]) -> Mapping[str, Tensor]:
        nonlocal made
        made, reading.note_progress = True, note_progress
        return _mapped(reading, part)

    pieces = files.pinned(master_key(part), device, make, reading.check)
    if not made:
        reading.skip(part)
    for file, names in part.wanted.items():
        file.hashes.update((name, tensor_hash(name, pieces[name])) for name in names.difference(file.hashes))
    return pieces


def _onto_device(reading: ReadingProgress, part: StoredPart, device: torch.device) -> Mapping[str, Tensor]:
    pieces: dict[str, Tensor] = {}
    for file, names in part.wanted.items():
        with file.reading(names, reading.check):
            hashed = not names <= file.hashes.keys()
            digests: dict[str, str] = {}
            for name, tensor, digest in reading.read_onto(file, names, device, hashed=hashed):
                pieces[name], digests[name] = tensor, digest
            if hashed:
                file.hashes.update(digests)
    return pieces


def _mapped(reading: ReadingProgress, part: StoredPart) -> HostWeights:
    found = HostWeights()
    for file, names in part.wanted.items():
        with file.reading(names, reading.check):
            missing = names.difference(file.hashes)
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hash") as pool:
                digests = {}
                for name, tensor in reading.read(file, names):
                    found[name] = tensor
                    if name in missing:
                        digests[name] = pool.submit(tensor_hash, name, tensor)
                file.hashes.update({name: digest.result() for name, digest in digests.items()})
    return found


def _revision(part: StoredPart) -> str:
    """Hash over names, dtypes, shapes and values of what is stored, and over how it is to be understood where the
    stored tensors alone do not say so.
    """
    hashes = {name: file.hashes[name] for file, names in part.wanted.items() for name in names}
    digest = hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode())
    for name, recipe in sorted(part.recipes.items()):
        if recipe.detail:
            digest.update(f"{name}={recipe.detail}({', '.join(recipe.pieces)});".encode())
    return digest.hexdigest()


def tensor_hash(name: str, tensor: Tensor) -> str:
    """Hash over name, dtype, shape and values, hexadecimal."""
    digest = hashlib.sha256(tensor_hash_prefix(name, tensor.dtype, tuple(tensor.shape)))
    values: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest.update(values)
    return digest.hexdigest()
