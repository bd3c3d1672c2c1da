"""The common form of every adapter format: changes of named weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """A change of one weight."""

    @property
    def rank(self) -> int:
        """Rank of its low-rank pair; 0 where it has none."""
        ...

    def delta_shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes."""
        ...

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """The changed weight, in the weight's dtype and on its device; `weight` stays as it is."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W' = W + (B @ A) · (alpha / rank) · multiplier, with the reference's order of roundings.

    Everything is rounded to the weight's dtype on the way, with s taken as one double:
    delta = dtype(B @ A), W' = dtype(W + dtype(delta · s)).
    """

    down: Tensor = field(repr=False)
    """A: (rank, in)."""
    up: Tensor = field(repr=False)
    """B: (out, rank)."""
    alpha: float | None
    """The rank where the file names none."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    def delta_shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """(out, in) → the same; bit-identical to `weight` at multiplier 0."""
        scale = (self.alpha if self.alpha is not None else float(self.rank)) / self.rank * multiplier
        up = self.up.to(device=weight.device, dtype=weight.dtype)
        down = self.down.to(device=weight.device, dtype=weight.dtype)
        delta = torch.matmul(up, down)
        return weight + delta * scale
