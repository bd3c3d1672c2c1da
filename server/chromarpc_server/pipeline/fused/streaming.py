"""Blocks whose weights lie in host memory and are copied to the device ahead of use, step after step.

A streamed block has its place in a ring on the device (see `streamed.Ring`), always the same one, so that its
layers' parameters are set once: what changes is what lies there. A stream of its own copies; the next block for a
place is begun when the last one that computed there was given to the device, and a block waits for its own copy
before it computes. The host waits for neither.

Blocks that stay lie beside the ring in one piece of memory, allocated before anything else: else what merging
takes for a while would leave holes between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from chromarpc_server.pipeline.memory import locked_bytes
from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.streamed import BlockSizes, Ring, aligned
from chromarpc_server.pipeline.weights.quantization import FLOAT8


class Copier(Protocol):
    """Copies from host memory to the device beside what computes there."""

    def copy(self, target: Tensor, source: Tensor) -> object:
        """Begins a copy once all that the device was given to compute so far is done. Returns what to wait for."""
        ...

    def wait(self, copied: object) -> None:
        """Has whatever the device is given to compute from now on wait for that copy."""
        ...

    def finish(self) -> None:
        """Waits until every copy is done."""
        ...


class PlainCopier:
    """For CPUs, which copy while the caller waits."""

    def copy(self, target: Tensor, source: Tensor) -> object:
        """See `Copier.copy`."""
        target.copy_(source)
        return None

    def wait(self, copied: object) -> None:
        """It is done."""

    def finish(self) -> None:
        """Nothing is under way."""


class StreamCopier:
    """For GPUs: on a stream of its own, from page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        """`device`: that copies and computes."""
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> object:
        """See `Copier.copy`."""
        given = torch.cuda.Event()
        given.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(given)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return copied

    def wait(self, copied: object) -> None:
        """See `Copier.wait`."""
        if isinstance(copied, torch.cuda.Event):
            torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self) -> None:
        """See `Copier.finish`."""
        self.stream.synchronize()


@dataclass(frozen=True)
class _Place:
    """Of one matrix: within its block, and on the device while that computes."""

    block: int
    offset: int
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The matrix in a block's memory."""
        size = self.shape[0] * self.shape[1]
        return memory[self.offset : self.offset + size].view(FLOAT8).view(self.shape)


class BlockStream:
    """The float8 matrices of all blocks of one transformer. Belongs to the thread that owns the device.

    A step is `begin`, then for every block in its order `enter`, its computation, `leave`.
    """

    def __init__(
        self, model: ChromaTransformer, count: int, device: torch.device, copier: Copier | None = None
    ) -> None:
        """Takes the memory; nothing lies in it yet.

        Args:
            model: whose blocks; its parameters may be on `meta`.
            count: of the blocks that are streamed.
            device: where they compute.
            copier: what copies; by default a stream of the device's own.

        Raises:
            OutOfMemory: the system does not allow so much page-locked memory.
        """
        self._places = _places(model)
        sizes = BlockSizes.of({name: place.shape for name, place in self._places.items()})
        streamed = sizes.streamed(count)
        self._turn = {block: turn for turn, block in enumerate(streamed)}
        lengths = [sizes.size_of(block) for block in streamed]
        self._ring = Ring.of(lengths, sizes.ring_bytes(count))
        kept = [block for block in range(sizes.count) if block not in self._turn]
        self._device_memory = torch.empty(
            sum(sizes.size_of(block) for block in kept) + self._ring.size_bytes, dtype=torch.uint8, device=device
        )
        self._host_memory = locked_bytes(sum(lengths), device)
        self._on_device: dict[int, Tensor] = {}
        """Of every block; streamed ones share theirs."""
        end = self._ring.size_bytes
        for block in kept:
            self._on_device[block] = self._device_memory[end : end + sizes.size_of(block)]
            end += sizes.size_of(block)
        for block, offset, length in zip(streamed, self._ring.offsets, lengths, strict=True):
            self._on_device[block] = self._device_memory[offset : offset + length]
        self._on_host = dict(zip(streamed, self._host_memory.split(lengths), strict=True)) if lengths else {}
        self._streamed = streamed
        self.copier = copier or (StreamCopier(device) if device.type == "cuda" else PlainCopier())
        self._copied: dict[int, object] = {}
        """By turn: what to wait for before the block computes."""
        self._next_turn: int | None = None
        """Whose it is; None while nobody knows what lies in the ring."""

    def __contains__(self, name: str) -> bool:
        """Whether a parameter of this name is held here."""
        return name in self._places

    @property
    def size_bytes(self) -> int:
        """On the device."""
        return self._device_memory.nbytes

    @property
    def host_bytes(self) -> int:
        """In page-locked host memory; all of it is copied in every step."""
        return self._host_memory.nbytes

    def weight(self, name: str) -> Tensor:
        """The matrix where it is multiplied by; of a streamed block between its `enter` and `leave`."""
        place = self._places[name]
        return place.of(self._on_device[place.block])

    def stored(self, name: str) -> Tensor:
        """The matrix where it always is."""
        place = self._places[name]
        return place.of(self._on_host.get(place.block, self._on_device[place.block]))

    def is_streamed(self, name: str) -> bool:
        """Whether a parameter lies in host memory."""
        return name in self._places and self._places[name].block in self._turn

    def put(self, name: str, values: Tensor) -> None:
        """Writes a streamed matrix; between `forget` and the next step."""
        self.stored(name).copy_(values, non_blocking=True)

    def forget(self) -> None:
        """Matrices are about to be written: what is in the ring is of no use any more, and no copy is under way
        by the time they are.
        """
        for copied in self._copied.values():
            self.copier.wait(copied)
        self._copied.clear()
        self._next_turn = None

    def begin(self) -> None:
        """A step begins. Where the last one was not finished, or weights were written, the ring is filled anew."""
        if self._next_turn != 0:
            for turn in self._ring.first:
                self._copy(turn)
            self._next_turn = 0

    def enter(self, block: int) -> None:
        """A block is about to be given to the device."""
        turn = self._turn.get(block)
        if turn is None:
            return
        if turn != self._next_turn:
            raise RuntimeError(f"block {block} out of turn")
        self.copier.wait(self._copied[turn])

    def leave(self, block: int) -> None:
        """It was: its place is the next one's."""
        turn = self._turn.get(block)
        if turn is None:
            return
        for other in self._ring.released[turn]:
            self._copy(other)
        self._next_turn = (turn + 1) % len(self._streamed)

    def _copy(self, turn: int) -> None:
        block = self._streamed[turn]
        self._copied[turn] = self.copier.copy(self._on_device[block], self._on_host[block])

    def __del__(self) -> None:
        """No copy may be under way from memory that is unlocked, or into memory that another has."""
        with suppress(Exception):  # the interpreter may be ending
            self.copier.finish()


def _places(model: ChromaTransformer) -> Mapping[str, _Place]:
    found: dict[str, _Place] = {}
    kinds = {"double_blocks": model.double_blocks, "single_blocks": model.single_blocks}
    block = 0
    for kind, blocks in kinds.items():
        for index, module in enumerate(blocks):
            end = 0
            for path, layer in _linears(module):
                shape = layer.out_features, layer.in_features
                found[f"{kind}.{index}.{path}.weight"] = _Place(block, end, shape)
                end += aligned(shape[0] * shape[1])
            block += 1
    return found


def _linears(module: nn.Module) -> list[tuple[str, Linear]]:
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, Linear)]
