"""What an adapter adds beside a linear layer, instead of changing its weight: the trainer's own form.

`place` decides for each change whether it can run beside the weight or has to be merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, first_named
from chromarpc_server.domain.trainer import LokrForm, TrainerSettings
from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.adapters.change import Additive, Change, Kronecker, LowRank, Rows
from chromarpc_server.pipeline.weights.quantizers import require_finite


@dataclass(frozen=True)
class BesidePath:
    """A LoRA's path beside one linear layer: dtype(up(down(float32(x))) · multiplier)."""

    down: Tensor = field(repr=False)
    """(rank, in) float32."""
    up: Tensor = field(repr=False)
    """(out, rank) float32."""
    multiplier: float

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """X (…, in), the layer's output (…, out) → the output with the path added."""
        added = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return output + (added * self.multiplier).to(output.dtype)

    @property
    def size_bytes(self) -> int:
        """Of its factors."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class KroneckerPath:
    """A LoKr's path beside one linear layer, factorized in the layer's dtype (the trainer since 2026-07-15)."""

    first: Tensor = field(repr=False)
    """w1: (out_l, in_m) float32."""
    second: tuple[Tensor, ...] = field(repr=False)
    """w2 (out_k, in_n), or its factors (out_k, rank) and (rank, in_n); float32."""
    scale: float
    multiplier: float

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """As `BesidePath`."""
        dtype = output.dtype
        first, second = self.first.to(dtype), [factor.to(dtype) for factor in self.second]
        blocks = x.to(dtype).unflatten(-1, (first.shape[1], second[-1].shape[1]))
        if len(second) == 1:
            inner = torch.einsum("...qs,os->...qo", blocks, second[0])
        else:
            inner = torch.einsum("...qs,rs->...qr", blocks, second[1])
            inner = torch.einsum("...qr,or->...qo", inner, second[0])
        delta = torch.einsum("...qo,pq->...po", inner, first * self.scale).flatten(-2, -1)
        return output + delta * torch.tensor(self.multiplier).to(dtype)

    @property
    def size_bytes(self) -> int:
        """Of its factors."""
        return self.first.nbytes + sum(factor.nbytes for factor in self.second)


Path = BesidePath | KroneckerPath


@dataclass(frozen=True)
class Pair:
    """A low-rank change of a linear layer's weight, up @ down, with every scale but the multiplier in `up`."""

    down: Tensor = field(repr=False)
    """(rank, in), in the file's dtype."""
    up: Tensor = field(repr=False)
    """(out, rank)."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def path(self, multiplier: float, device: torch.device) -> BesidePath:
        """As the trainer runs it."""
        down, up = (tensor.to(device=device, dtype=torch.float32) for tensor in (self.down, self.up))
        return BesidePath(down, up, multiplier)


@dataclass(frozen=True)
class Placed:
    """One adapter's change of one parameter, and where it goes."""

    change: Change = field(repr=False)
    sha256: str
    """Of the adapter."""
    multiplier: float

    @property
    def key(self) -> tuple[str, float]:
        """What decides its values."""
        return self.sha256, self.multiplier


@dataclass(frozen=True)
class Placement:
    """An adapter set's changes, by parameter name and in the order of application."""

    merged: Mapping[str, tuple[Placed, ...]]
    """Into the master weight, before it is quantized."""
    added: Mapping[str, tuple[Placed, ...]]
    """To the quantized weight: LoKr as the trainer held it before 2026-07-15."""
    beside: Mapping[str, tuple[Placed, ...]]
    """Beside the layer."""


def place(
    adapters: Sequence[tuple[Adapter, float]], linears: Sequence[str], settings: TrainerSettings
) -> Placement:
    """Decides where each change goes.

    Args:
        adapters: in order, with their multipliers.
        linears: names of the parameters that are linear layers' weights; nothing else can have a path beside it.
        settings: what the trainer's config says. An unquantized model has its adapters merged.
    """
    merged: dict[str, tuple[Placed, ...]] = {}
    added: dict[str, tuple[Placed, ...]] = {}
    beside: dict[str, tuple[Placed, ...]] = {}
    linear = frozenset(linears)
    for adapter, multiplier in adapters:
        if multiplier == 0:
            continue
        for name, change in adapter.changes.items():
            where = merged
            if settings.quantize and name in linear and goes_beside(change):
                old = isinstance(change, Kronecker) and settings.lokr_form is LokrForm.WEIGHT
                where = added if old else beside
            where[name] = (*where.get(name, ()), Placed(change, adapter.sha256, multiplier))
    return Placement(merged, added, beside)


def lies_beside(adapter: Adapter, settings: TrainerSettings) -> bool:
    """Whether all of an adapter's changes run beside the weights, as the trainer has them."""
    if not settings.quantize:
        return False
    old = settings.lokr_form is LokrForm.WEIGHT
    return all(
        name.endswith(".weight") and goes_beside(change) and not (old and isinstance(change, Kronecker))
        for name, change in adapter.changes.items()
    )


def goes_beside(change: Change) -> bool:
    """Whether a change can run beside its layer: low-rank, in whole or by rows, or a Kronecker product."""
    if isinstance(change, Rows):
        return all(isinstance(part.change, LowRank) for part in change.parts)
    return isinstance(change, LowRank | Kronecker)


def pair_of(change: Change) -> Pair | None:
    """A low-rank change's two factors, made once and kept with the change; None for any other."""
    factors = change.factors if isinstance(change, LowRank | Rows) else None
    return None if factors is None else Pair(factors.down, factors.up)


def kronecker_path(change: Kronecker, multiplier: float, device: torch.device) -> KroneckerPath:
    """As the trainer runs it since 2026-07-15."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=torch.float32)

    second = change.second
    factors = (wide(second.left),) if second.right is None else (wide(second.left), wide(second.right))
    return KroneckerPath(change.first.matrix(device), factors, change.scale, multiplier)


def merge(change: Change, weight: Tensor, multiplier: float) -> Tensor:
    """A changed weight as the trainer merges: the sum in float32, rounded once. (out, in) → the same."""
    if isinstance(change, LowRank | Kronecker):
        additive: Additive = change
        return (weight.float() + additive.difference(weight.device) * multiplier).to(weight.dtype)
    if isinstance(change, Rows):
        changed = weight.clone()
        for part in change.parts:
            changed[part.start : part.stop] = merge(part.change, weight[part.start : part.stop], multiplier)
        return changed
    return change.apply(weight, multiplier)


def add_to_quantized(change: Change, weight: Tensor, multiplier: float) -> Tensor:
    """W̃ + dtype(w1 ⊗ w2 · scale) · multiplier in the weight's dtype: the trainer's LoKr before 2026-07-15."""
    if not isinstance(change, Kronecker):
        raise TypeError(f"a {type(change).__name__} is not added to a quantized weight")
    return weight + change.difference(weight.device).to(weight.dtype) * multiplier


def require_finite_weights(
    finite: Mapping[str, Tensor], merged: Mapping[str, tuple[object, ...]], qtype: str | None
) -> None:
    """Refuses weights that are not finite after merging and quantizing.

    Args:
        finite: by parameter name, whether every value is: () bool.
        merged: by parameter name, what was merged into it.
        qtype: the quantizer; None for none.

    Raises:
        LoraIncompatible: one that adapters were merged into.
        WeightsInvalid: one as it is stored.
    """
    changed = {name: is_finite for name, is_finite in finite.items() if merged[name]}
    if changed:
        good = torch.stack(list(changed.values())).tolist()
        bad = [name for name, is_finite in zip(changed, good, strict=True) if not is_finite]
        if bad:
            raise LoraIncompatible(f"merging the adapters overflows {first_named(bad, 3)}")
    require_finite(finite, qtype)
