"""Which of a transformer's blocks are streamed, and where they take turns on the device: arithmetic of sizes.

A streamed block's matrices lie in host memory and are copied to the device for every step. Blocks that compute at
different times have the same memory there, a ring that is as large as two of the largest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes that every matrix begins at a multiple of."""
TURNS = 2
"""Largest blocks that the ring has room for: one computes while the next one is copied."""


def aligned(size_bytes: int) -> int:
    """Rounded up, so that the next matrix begins as it has to."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of the blocks' matrices in float8, double blocks first, in the order in which they compute."""

    double: int = 0
    """Of each double block."""
    single: int = 0
    """Of each single block."""
    doubles: int = 0
    """How many there are."""
    singles: int = 0
    """How many there are."""

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> BlockSizes:
        """`shapes`: of a transformer's parameters, by their native names."""
        doubles, singles = (_count(shapes, kind) for kind in ("double_blocks", "single_blocks"))
        return cls(_matrices(shapes, "double_blocks.0."), _matrices(shapes, "single_blocks.0."), doubles, singles)

    @property
    def count(self) -> int:
        """Of all blocks."""
        return self.doubles + self.singles

    def size_of(self, index: int) -> int:
        """Bytes of a block; single ones are counted after double ones."""
        return self.double if index < self.doubles else self.single

    def streamed(self, count: int) -> tuple[int, ...]:
        """Indices of the blocks that are streamed where `count` are, in the order in which they compute.

        Double blocks are twice as large as single ones and take about as long, so that four single ones are taken
        with each double one where there are twice as many: then as many bytes are copied in every millisecond.
        They are spread evenly between those that stay, and the first block is the last one to be taken.
        """
        share = count * self.doubles // max(1, self.doubles + 2 * self.singles)
        singles = min(self.singles, count - share)
        doubles = count - singles
        return (
            *_spread(doubles, self.doubles),
            *(self.doubles + index for index in _spread(singles, self.singles)),
        )

    def streamed_bytes(self, count: int) -> int:
        """Copied in every step; held in host memory."""
        return sum(self.size_of(index) for index in self.streamed(count))

    def ring_bytes(self, count: int) -> int:
        """Of the device's memory in which the streamed blocks take turns."""
        sizes = sorted(self.size_of(index) for index in self.streamed(count))
        return min(TURNS * sizes[-1], sum(sizes)) if sizes else 0

    def saved_bytes(self, count: int) -> int:
        """What the device holds less than all blocks."""
        return self.streamed_bytes(count) - self.ring_bytes(count)


def _count(shapes: Mapping[str, Sequence[int]], kind: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})


def _matrices(shapes: Mapping[str, Sequence[int]], block: str) -> int:
    return sum(
        aligned(math.prod(shape)) for name, shape in shapes.items() if name.startswith(block) and len(shape) > 1
    )


def _spread(count: int, among: int) -> tuple[int, ...]:
    """`count` of the indices below `among`, evenly; 0 only where all are taken."""
    if count == among:
        return tuple(range(among))
    return tuple((index + 1) * (among - 1) // count for index in range(count))


@dataclass(frozen=True)
class Ring:
    """Where blocks lie that take turns in the same memory, and when each may be copied. Blocks are counted in the
    order in which they compute; after the last one comes the first one of the next step.
    """

    offsets: tuple[int, ...]
    """Of each block, in bytes."""
    size_bytes: int
    released: tuple[tuple[int, ...], ...]
    """For each block the ones whose place is free once it was computed, and it is the last to be waited for."""
    first: tuple[int, ...]
    """Blocks that are there before a step begins: for each of them the last one to be waited for is of the step
    before."""

    @classmethod
    def of(cls, sizes: Sequence[int], size_bytes: int) -> Ring:
        """For blocks of these sizes.

        Args:
            sizes: bytes of each.
            size_bytes: of the memory; at least the largest one's.
        """
        offsets: list[int] = []
        end = 0
        for size in sizes:
            begin = end if end + size <= size_bytes else 0
            offsets.append(begin)
            end = begin + size
        count = len(sizes)
        released: list[list[int]] = [[] for _ in sizes]
        first: list[int] = []
        for later in range(count):
            back = next(
                back
                for back in range(1, count + 1)
                if _overlap(offsets[later], sizes[later], offsets[later - back], sizes[later - back])
            )
            released[(later - back) % count].append(later)
            if back > later:
                first.append(later)
        in_order = tuple(
            tuple(sorted(those, key=lambda later, block=block: (later - block - 1) % count))  # type: ignore[misc]
            for block, those in enumerate(released)
        )
        return cls(tuple(offsets), size_bytes, in_order, tuple(first))


def _overlap(one: int, one_size: int, other: int, other_size: int) -> bool:
    return one < other + other_size and other < one + one_size
