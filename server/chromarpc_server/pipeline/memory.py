"""What stays where on a GPU: chosen once, when a checkpoint is loaded, from the memory that may be used.

All arrangements compute the same bits but the last, whose autoencoder works in tiles and changes pixels a little.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chromarpc_server.domain.errors import OutOfMemory
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.device import on_device

GIB = 1024**3
_FOR_EVERY_CONTEXT = 1
"""cudaHostRegisterPortable."""
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
RUNTIME_BYTES = int(0.7 * GIB)
"""The driver's context, loaded kernels and the libraries' workspaces."""
STEP_BYTES = int(1.1 * GIB)
"""Activations of one step at 1024×1024 with guidance, and the largest weight dequantized."""
GRAPH_BYTES = int(1.1 * GIB)
"""A recorded step's own activations."""
DECODE_BYTES = int(2.5 * GIB)
"""Of the autoencoder at 1024×1024."""
TILED_DECODE_BYTES = int(0.9 * GIB)
ENCODE_BYTES = int(0.4 * GIB)
"""Of the text encoder: activations, and two of its layers where they are copied one by one."""


@dataclass(frozen=True)
class PartSizes:
    """Bytes of a checkpoint's parts as they could be held."""

    master: int
    dequantized: int
    float8: int
    """The transformer with its blocks in float8."""
    text_encoder: int
    """In float8."""
    autoencoder: int
    beside: int = 0
    """Of adapters beside the weights, in a preview profile, padded to the smallest of its ranks."""


_LADDER = (
    MemoryPlan("dequantized", "device", "device", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("dequantized", "device", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "device", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=False),
    MemoryPlan("float8", "host", "host", tile_autoencoder=True, record_graphs=False),
)
"""Fastest first."""


def plan_memory(
    usable_bytes: int, sizes: PartSizes, choice: MemoryChoice, *, second_bytes: int | None = None
) -> MemoryPlan:
    """The fastest arrangement that fits, among those that the settings allow.

    Args:
        usable_bytes: of the device.
        sizes: of the checkpoint's parts.
        choice: what the settings say.
        second_bytes: what may be used of the other device of a pair, which has the transformer alone.

    Raises:
        OutOfMemory: not even the smallest one does.
    """
    allowed = [_forced(plan, choice) for plan in _LADDER]
    for plan in allowed:
        needed = estimate_bytes(plan, sizes)
        if needed <= usable_bytes and (second_bytes is None or estimate_second_bytes(plan, sizes) <= second_bytes):
            return _with_trainer_encoder(replace(plan, estimated_bytes=needed, usable_bytes=usable_bytes), sizes)
    least, usable, whose = min(estimate_bytes(plan, sizes) for plan in allowed), usable_bytes, "the device's"
    if least <= usable_bytes and second_bytes is not None:
        least, usable = min(estimate_second_bytes(plan, sizes) for plan in allowed), second_bytes
        whose = "the pair's second device's"
    raise OutOfMemory(f"the model needs {least / 1e9:.1f} GB of {whose} memory, and may use {usable / 1e9:.1f} GB")


def estimate_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What an arrangement takes at most, for images up to 1024×1024."""
    held = _transformer_bytes(plan, sizes) + sizes.autoencoder
    held += sizes.text_encoder if plan.text_encoder == "device" else 0
    held += sizes.text_encoder if plan.trainer_text_encoder == "device" else 0
    held += sizes.master if plan.master == "device" else 0
    return held + working_bytes(plan) + RUNTIME_BYTES


def estimate_second_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What it takes of a pair's second device."""
    graphs = GRAPH_BYTES if plan.record_graphs else 0
    return _transformer_bytes(plan, sizes) + STEP_BYTES + graphs + RUNTIME_BYTES


def _transformer_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    return (sizes.dequantized if plan.weights == "dequantized" else sizes.float8) + sizes.beside


def working_bytes(plan: MemoryPlan) -> int:
    """What drawing takes beside everything that is held."""
    working = max(STEP_BYTES, ENCODE_BYTES, TILED_DECODE_BYTES if plan.tile_autoencoder else DECODE_BYTES)
    return working + (GRAPH_BYTES if plan.record_graphs else 0)


def _with_trainer_encoder(plan: MemoryPlan, sizes: PartSizes) -> MemoryPlan:
    """The plan with a text encoder of the preview profiles beside the other one, where both fit the device."""
    both = replace(plan, trainer_text_encoder="device")
    needed = estimate_bytes(both, sizes)
    if plan.text_encoder == "host" or needed > plan.usable_bytes:
        return plan
    return replace(both, estimated_bytes=needed)


def _forced(plan: MemoryPlan, choice: MemoryChoice) -> MemoryPlan:
    return replace(
        plan,
        weights=plan.weights if choice.weights == "auto" else choice.weights,
        text_encoder=plan.text_encoder if choice.text_encoder == "auto" else choice.text_encoder,
        master=plan.master if choice.master == "auto" else choice.master,
        tile_autoencoder=plan.tile_autoencoder if choice.tiling == "auto" else choice.tiling == "on",
    )


class _LockedMemory(mmap.mmap):
    """Host memory, page-locked for a GPU, that is unlocked before it goes: else the driver would take what lies
    there next for locked already, and fail to lock it.
    """

    _locked_for: tuple[torch.device, int] | None = None

    def lock(self, device: torch.device, address: int, size: int) -> None:
        """Locks the first `size` bytes, which are at `address`.

        Raises:
            OutOfMemory: the system does not allow it.
        """
        with on_device(device):
            if int(torch.cuda.cudart().cudaHostRegister(address, size, _FOR_EVERY_CONTEXT)) == 0:
                self._locked_for = device, address
                return
            with suppress(RuntimeError):
                # The runtime reports a failure once more at the next launch, which would blame that.
                torch.zeros(1, device=device)
        raise OutOfMemory(f"{size / 1e9:.1f} GB of host memory cannot be locked for the GPU")

    def __del__(self) -> None:
        if self._locked_for is not None:
            device, address = self._locked_for
            with suppress(Exception), on_device(device):  # the interpreter may be ending
                torch.cuda.cudart().cudaHostUnregister(address)


def pin(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of host tensors in one block of page-locked memory, which stays as long as any of them.

    One block, because torch's own allocator rounds every tensor up to a power of two and locks each by itself.
    """
    align = 256
    total = sum(-(-tensor.nbytes // align) * align for tensor in tensors.values())
    memory = _LockedMemory(-1, max(total, 1), **_PRIVATE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    pinned: dict[str, Tensor] = {}
    offset = 0
    for name, tensor in tensors.items():
        piece = block[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        piece.copy_(tensor)
        pinned[name] = piece
        offset += -(-tensor.nbytes // align) * align
    memory.lock(device, block.data_ptr(), total)
    return pinned
