"""The common form of every adapter format: changes of named weights.

A plain low-rank pair keeps the reference's order of roundings in the weight's own dtype. Every other change is
computed in float32 and rounded to the weight's dtype once. A parser only names factors; nothing here is
multiplied out before its shape was compared with the weight's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from chromarpc_server.pipeline.precision import float32_products

Shape = tuple[int, ...]

_KEPT = frozenset({torch.bfloat16, torch.float16, torch.float32})
"""Types in which factors are put together as they are."""
EPSILON = torch.finfo(torch.float32).eps
"""Keeps DoRA's division finite for a row of zeros; LyCORIS and OneTrainer add the same."""


class Change(Protocol):
    """A change of one weight, or of some of its rows."""

    @property
    def shape(self) -> Shape:
        """Shape of what it changes."""
        ...

    @property
    def rank(self) -> int | None:
        """Rank of its low-rank factors; None where it has none."""
        ...

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """The changed weight, in the weight's dtype and on its device; `weight` stays as it is."""
        ...


class Additive(Change, Protocol):
    """A change that adds the same whatever the weight is."""

    def difference(self, device: torch.device) -> Tensor:
        """What it adds at multiplier 1, float32, of `shape`."""
        ...


def _float32(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device=device, dtype=torch.float32)


def _add(weight: Tensor, difference: Tensor, multiplier: float) -> Tensor:
    return (weight.float() + difference * multiplier).to(weight.dtype)


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a whole weight as one pair, up @ down, with every scale but the multiplier in `up`."""

    down: Tensor = field(repr=False)
    """(rank, in)."""
    up: Tensor = field(repr=False)
    """(out, rank)."""


@dataclass(frozen=True)
class LowRank:
    """W' = W + (B @ A) · (alpha / rank) · multiplier.

    Everything is rounded to the weight's dtype on the way, as the reference does, with s taken as one double:
    delta = dtype(B @ A), W' = dtype(W + dtype(delta · s)). With a float32 weight all of it is float32.
    """

    down: Tensor = field(repr=False)
    """A: (rank, in)."""
    up: Tensor = field(repr=False)
    """B: (out, rank)."""
    alpha: float | None
    """The rank where the file names none."""

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return (self.alpha if self.alpha is not None else float(self.rank)) / self.rank

    def difference(self, device: torch.device) -> Tensor:
        """(B @ A) · scale, float32."""
        with float32_products(device):
            product = torch.matmul(_float32(self.up, device), _float32(self.down, device))
        return product * self.scale

    @cached_property
    def factors(self) -> Factors:
        """Its own, `up` scaled once where a scale counts, in float32 then."""
        return Factors(self.down, self.scaled_up())

    def scaled_up(self) -> Tensor:
        """B itself, or B · scale in float32 where a scale counts."""
        return self.up if self.scale == 1 else self.up.float() * self.scale

    @property
    def derived_bytes(self) -> int:
        """Of tensors that are kept beside the file's own."""
        kept = self.__dict__.get("factors")
        return 0 if kept is None or kept.up is self.up else int(kept.up.nbytes)

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """(out, in) → the same."""
        up = self.up.to(device=weight.device, dtype=weight.dtype)
        down = self.down.to(device=weight.device, dtype=weight.dtype)
        with float32_products(weight.device):
            delta = torch.matmul(up, down)
        return weight + delta * (self.scale * multiplier)


@dataclass(frozen=True)
class Full:
    """W' = W + D · multiplier: every element has its own difference."""

    values: Tensor = field(repr=False)
    """D, of the weight's shape."""
    scale: float = 1.0

    @property
    def shape(self) -> Shape:
        """D's."""
        return tuple(self.values.shape)

    @property
    def rank(self) -> None:
        """It has none."""
        return

    def difference(self, device: torch.device) -> Tensor:
        """D · scale, float32."""
        return _float32(self.values, device) * self.scale

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """Of any shape → the same."""
        return _add(weight, self.difference(weight.device), multiplier)


@dataclass(frozen=True)
class Factor:
    """A matrix that a file gives whole, or as two thin ones."""

    left: Tensor = field(repr=False)
    """(rows, columns), or (rows, rank) where there is a `right`."""
    right: Tensor | None = field(repr=False, default=None)
    """(rank, columns)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        right = self.left if self.right is None else self.right
        return (self.left.shape[0], right.shape[1])

    @property
    def rank(self) -> int | None:
        """None where it is whole."""
        return None if self.right is None else self.right.shape[0]

    def matrix(self, device: torch.device) -> Tensor:
        """The product, float32."""
        left = _float32(self.left, device)
        if self.right is None:
            return left
        with float32_products(device):
            return torch.matmul(left, _float32(self.right, device))


@dataclass(frozen=True)
class Kronecker:
    """LoKr: W' = W + (w1 ⊗ w2) · scale · multiplier."""

    first: Factor
    second: Factor
    alpha: float | None
    """Counts only where a factor is low-rank: trainers write 9999999999 into full-rank files."""

    @property
    def shape(self) -> Shape:
        """Products of the factors' rows, and of their columns."""
        rows, columns = self.first.shape
        return (rows * self.second.shape[0], columns * self.second.shape[1])

    @property
    def rank(self) -> int | None:
        """The second factor's where both are low-rank, as LyCORIS and ComfyUI take it."""
        return self.first.rank if self.second.rank is None else self.second.rank

    @property
    def scale(self) -> float:
        """Alpha / rank, or 1 where both factors are whole."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def difference(self, device: torch.device) -> Tensor:
        """(w1 ⊗ w2) · scale, float32."""
        return torch.kron(self.first.matrix(device), self.second.matrix(device)) * self.scale

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """(out, in) → the same."""
        return _add(weight, self.difference(weight.device), multiplier)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: W' = W + ((w1a @ w1b) ∘ (w2a @ w2b)) · (alpha / rank) · multiplier."""

    first: Factor
    second: Factor
    alpha: float | None

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.first.shape

    @property
    def rank(self) -> int | None:
        """The first product's, as LyCORIS and ComfyUI take it."""
        return self.first.rank

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def difference(self, device: torch.device) -> Tensor:
        """The scaled product, float32."""
        return self.first.matrix(device) * self.second.matrix(device) * self.scale

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """(out, in) → the same."""
        return _add(weight, self.difference(weight.device), multiplier)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: V = W + Δ, W' = V · m / (‖V‖ + ε) at multiplier 1 (Liu et al. 2024, eq. 5, as trainers compute it).

    The norm is each output row's, or each input column's where the file's magnitude lies that way (older
    LyCORIS). Between 0 and 1 and beyond, W' moves along the line from W: W + multiplier · (W'(1) − W).
    """

    change: Additive
    """Gives Δ."""
    magnitude: Tensor = field(repr=False)
    """m: (out, 1), or (1, in) for column norms."""

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.change.shape

    @property
    def rank(self) -> int | None:
        """Δ's."""
        return self.change.rank

    def _decomposed(self, weight: Tensor) -> Tensor:
        moved = weight + self.change.difference(weight.device)
        along = 1 if self.magnitude.shape[1] == 1 else 0
        norm: Tensor = torch.linalg.vector_norm(moved, dim=along, keepdim=True)
        return moved * (_float32(self.magnitude, weight.device) / (norm + EPSILON))

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """(out, in) → the same."""
        base = weight.float()
        changed = self._decomposed(base)
        if multiplier != 1:
            changed = base + (changed - base) * multiplier
        return changed.to(weight.dtype)


@dataclass(frozen=True)
class RowChange:
    """A change of the rows from `start` up to `stop`."""

    start: int
    stop: int
    change: Change


@dataclass(frozen=True)
class Rows:
    """Changes of disjoint rows of a fused weight: q, k, v (and mlp) trained apart.

    Each part is merged into its own rows with its own rank, alpha and magnitude, exactly as if those rows were
    a weight of their own; rows without a part keep their bits.
    """

    whole: Shape
    """The whole weight's shape."""
    parts: tuple[RowChange, ...]

    @property
    def shape(self) -> Shape:
        """The whole weight's."""
        return self.whole

    @property
    def rank(self) -> int | None:
        """The largest of its parts'."""
        return max((part.change.rank for part in self.parts if part.change.rank is not None), default=None)

    @cached_property
    def factors(self) -> Factors | None:
        """Its parts' as one pair, put together once; None where a part is not low-rank.

        In the file's dtype where all parts share it and no scale counts, else in float32.
        """
        parts = [(part, part.change) for part in self.parts if isinstance(part.change, LowRank)]
        if len(parts) < len(self.parts):
            return None
        pairs = [(part, change.down, change.scaled_up()) for part, change in parts]
        dtypes = {tensor.dtype for _, *pair in pairs for tensor in pair}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= _KEPT else torch.float32
        down = torch.cat([part_down.to(dtype) for _, part_down, _ in pairs])
        up = torch.zeros(self.whole[0], down.shape[0], dtype=dtype)
        start = 0
        for part, part_down, part_up in pairs:
            stop = start + part_down.shape[0]
            up[part.start : part.stop, start:stop] = part_up
            start = stop
        return Factors(down, up)

    @property
    def derived_bytes(self) -> int:
        """As `LowRank.derived_bytes`."""
        kept = self.__dict__.get("factors")
        return 0 if kept is None else int(kept.down.nbytes + kept.up.nbytes)

    def apply(self, weight: Tensor, multiplier: float) -> Tensor:
        """The whole weight → the same shape."""
        changed = weight.clone()
        for part in self.parts:
            changed[part.start : part.stop] = part.change.apply(weight[part.start : part.stop], multiplier)
        return changed
