"""What stays where on a GPU and in host memory: chosen once, when a checkpoint is loaded, from what is free there.

All arrangements compute the same bits but those whose autoencoder works in tiles, which changes pixels a little.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chromarpc_server.domain.errors import OutOfMemory
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.device import on_device
from chromarpc_server.pipeline.streamed import BlockSizes, aligned

GIB = 1024**3
_FOR_EVERY_CONTEXT = 1
"""cudaHostRegisterPortable."""
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
RUNTIME_BYTES = int(0.7 * GIB)
"""Loaded kernels, the libraries' workspaces and what the allocator cannot use of what it took; and the driver's
context, of 0.5 GB, where that was not made yet when the free memory was asked for."""
MARGIN_BYTES = GIB // 4
"""Left free where blocks are streamed: as many stay as fit, so that nothing else is left over for what the
estimates miss and for a display that needs a little more than it did at the start."""
STEP_BYTES = int(1.1 * GIB)
"""Activations of one step at 1024×1024 with guidance, and the largest weight dequantized."""
GRAPH_BYTES = int(1.1 * GIB)
"""A recorded step's own activations."""
DECODE_BYTES = int(2.5 * GIB)
"""Of the autoencoder at 1024×1024."""
FUSED_DECODE_BYTES = int(1.8 * GIB)
"""Of its fused decoder, which takes 1.6 GB: where blocks are streamed no other profile than the fused ones is
served."""
TILED_DECODE_BYTES = int(0.9 * GIB)
ENCODE_BYTES = int(0.4 * GIB)
"""Of the text encoder: activations, and two of its layers where they are copied one by one."""
HOST_SPARE_BYTES = 2 * GIB
"""Of the host's free memory, left to everything else: parsed adapters, requests, images, the system."""


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
    blocks: BlockSizes = BlockSizes()
    """Of the transformer, as they could be streamed; none where they cannot be."""


_LADDER = (
    MemoryPlan("dequantized", "device", "device", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("dequantized", "device", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "device", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=True),
    MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=False),
    MemoryPlan("float8", "host", "host", tile_autoencoder=True, record_graphs=False),
)
"""Fastest first, with the whole transformer on the device."""


def plan_memory(
    usable_bytes: int,
    sizes: PartSizes,
    choice: MemoryChoice,
    *,
    second_bytes: int | None = None,
    host_bytes: int | None = None,
) -> MemoryPlan:
    """The fastest arrangement that fits, among those that the settings allow.

    Args:
        usable_bytes: of the device, as its driver says.
        sizes: of the checkpoint's parts.
        choice: what the settings say.
        second_bytes: what may be used of the other device of a pair, which has all of the transformer and no more.
        host_bytes: free in host memory; None where nobody knows.

    Raises:
        OutOfMemory: not even the smallest one fits the device, or what does not stay there does not fit the host.
    """
    allowed = list(_arrangements(sizes, choice, streams=choice.streaming and second_bytes is None))
    for plan in allowed:
        needed = estimate_bytes(plan, sizes)
        if needed <= usable_bytes and (second_bytes is None or estimate_second_bytes(plan, sizes) <= second_bytes):
            found = replace(plan, estimated_bytes=needed, usable_bytes=usable_bytes)
            return _on_host(_with_trainer_encoder(found, sizes), sizes, allowed, host_bytes)
    raise _too_small(usable_bytes, sizes, choice, allowed, second_bytes)


def _arrangements(sizes: PartSizes, choice: MemoryChoice, *, streams: bool) -> Iterator[MemoryPlan]:
    """Fastest first. Tiles, which change pixels, come before streamed blocks where the whole transformer fits with
    them, since every profile is served then, and after all of these where it does not.
    """
    for plan in _LADDER:
        yield _forced(plan, choice)
    if streams and choice.weights != "dequantized":
        for tiled in (False, True):
            for count in range(1, sizes.blocks.count + 1):
                plan = replace(_LADDER[-1], tile_autoencoder=tiled, streamed_blocks=count)
                yield _forced(plan, choice)


def estimate_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What an arrangement takes at most, for images up to 1024×1024."""
    held = _transformer_bytes(plan, sizes) + sizes.autoencoder
    held += sizes.text_encoder if plan.text_encoder == "device" else 0
    held += sizes.text_encoder if plan.trainer_text_encoder == "device" else 0
    held += sizes.master if plan.master == "device" else 0
    margin = MARGIN_BYTES if plan.streamed_blocks else 0
    return held + working_bytes(plan) + RUNTIME_BYTES + margin


def estimate_second_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What it takes of a pair's second device."""
    graphs = GRAPH_BYTES if plan.record_graphs else 0
    return _transformer_bytes(plan, sizes) + STEP_BYTES + graphs + RUNTIME_BYTES


def _transformer_bytes(plan: MemoryPlan, sizes: PartSizes) -> int:
    if plan.streamed_blocks:  # no preview profile is served, whose adapters would lie beside
        return sizes.float8 - sizes.blocks.saved_bytes(plan.streamed_blocks)
    return (sizes.dequantized if plan.weights == "dequantized" else sizes.float8) + sizes.beside


def working_bytes(plan: MemoryPlan) -> int:
    """What drawing takes beside everything that is held."""
    decode = FUSED_DECODE_BYTES if plan.streamed_blocks else DECODE_BYTES
    working = max(STEP_BYTES, ENCODE_BYTES, TILED_DECODE_BYTES if plan.tile_autoencoder else decode)
    return working + (GRAPH_BYTES if plan.record_graphs else 0)


def _with_trainer_encoder(plan: MemoryPlan, sizes: PartSizes) -> MemoryPlan:
    """The plan with a text encoder of the preview profiles beside the other one, where both fit the device."""
    both = replace(plan, trainer_text_encoder="device")
    needed = estimate_bytes(both, sizes)
    if plan.text_encoder == "host" or plan.streamed_blocks or needed > plan.usable_bytes:
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


def _locked(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What it holds of page-locked host memory."""
    held = sizes.blocks.streamed_bytes(plan.streamed_blocks)
    held += sizes.text_encoder if plan.text_encoder == "host" else 0
    return held + (sizes.master if plan.master == "host" else 0)


def _host_peak(plan: MemoryPlan, sizes: PartSizes) -> int:
    """What it takes of the host at most: while its text encoder is locked, that lies there twice."""
    twice = sizes.text_encoder if plan.text_encoder == "host" else 0
    return _locked(plan, sizes) + max(0, twice - sizes.blocks.streamed_bytes(plan.streamed_blocks))


def _on_host(plan: MemoryPlan, sizes: PartSizes, allowed: list[MemoryPlan], host_bytes: int | None) -> MemoryPlan:
    """The plan with the master page-locked, where it fits the host's memory, else mapped."""
    available = None if host_bytes is None else max(0, host_bytes - HOST_SPARE_BYTES)
    mapped = replace(plan, master="mapped") if plan.master == "host" else plan
    for found in (plan, mapped):
        if available is None or _host_peak(found, sizes) <= available:
            return replace(found, host_bytes=_locked(found, sizes), host_available_bytes=host_bytes or 0)
    needed = _host_peak(mapped, sizes)
    if not needed:
        return mapped
    told = (
        f"the model needs {_gb(needed)} of host memory beside a device with {_gb(plan.usable_bytes)} free, and of "
        f"{_gb(host_bytes or 0)} that the host has free it leaves {_gb(HOST_SPARE_BYTES)} to everything else: "
        "close what else holds host memory, or give the server's control group more"
    )
    larger = [
        estimate_bytes(other, sizes)
        for other in allowed
        if _host_peak(replace(other, master="mapped") if other.master == "host" else other, sizes)
        <= (available or 0)
    ]
    raise OutOfMemory(f"{told}; on this host a device with {_gb(min(larger))} free would do" if larger else told)


def _too_small(
    usable_bytes: int,
    sizes: PartSizes,
    choice: MemoryChoice,
    allowed: list[MemoryPlan],
    second_bytes: int | None,
) -> OutOfMemory:
    least, usable, whose = min(estimate_bytes(plan, sizes) for plan in allowed), usable_bytes, "the device"
    if least <= usable_bytes and second_bytes is not None:
        least, usable = min(estimate_second_bytes(plan, sizes) for plan in allowed), second_bytes
        whose = "the pair's second device"
    limit = choice.device_bytes
    settings = {
        "--weights": choice.weights,
        "--text-encoder-place": choice.text_encoder,
        "--master-place": choice.master,
        "--tiling": choice.tiling,
    }
    set_to = [f"{name} {value}" for name, value in settings.items() if value != "auto"]
    advice = ["close what else holds its memory"]
    if limit is not None:
        advice.append(f"allow more than --device-memory {_gb(limit)}")
    if set_to:
        advice.append(f"leave out {' and '.join(set_to)}")
    if second_bytes is not None:
        advice.append("leave out --cfg-parallel, since a pair streams no blocks")
    return OutOfMemory(
        f"{whose} has {_gb(usable)} of memory that may be used, and the smallest arrangement of this model needs "
        f"{_gb(least)} for images up to 1024×1024: {', or '.join(advice)}"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


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


def locked_bytes(size: int, device: torch.device) -> Tensor:
    """Page-locked host memory, which stays as long as anything of it; for a CPU ordinary memory.

    Raises:
        OutOfMemory: the system does not allow it.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    memory = _LockedMemory(-1, max(size, 1), **_PRIVATE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    memory.lock(device, block.data_ptr(), max(size, 1))
    return block[:size]


def pin(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of host tensors in one block of page-locked memory, which stays as long as any of them.

    One block, because torch's own allocator rounds every tensor up to a power of two and locks each by itself.
    """
    memory = _LockedMemory(-1, max(sum(aligned(tensor.nbytes) for tensor in tensors.values()), 1), **_PRIVATE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    pinned: dict[str, Tensor] = {}
    offset = 0
    for name, tensor in tensors.items():
        piece = block[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        piece.copy_(tensor)
        pinned[name] = piece
        offset += aligned(tensor.nbytes)
    memory.lock(device, block.data_ptr(), offset)
    return pinned
