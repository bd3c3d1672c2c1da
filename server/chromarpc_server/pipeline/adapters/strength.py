"""How large a change is, without the weight that it changes, and without multiplying out what need not be.

DoRA's rescaling depends on the weight and is left out: what is measured is the Δ below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from chromarpc_server.pipeline.adapters.change import (
    Change,
    Decomposed,
    Factor,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
    Rows,
)

_CPU = torch.device("cpu")
_LEAST = torch.finfo(torch.float32).tiny
_WITH_EXTREMES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that torch finds the extremes of as they are."""


def squared_norm(change: Change) -> float:
    """‖Δ‖² in Frobenius' sense at multiplier 1, in float64."""
    match change:
        case LowRank():
            return _product(change.up, change.down) * change.scale**2
        case Full():
            return _whole(change.values) * change.scale**2
        case Kronecker():  # ‖a ⊗ b‖ = ‖a‖ · ‖b‖
            return _factor(change.first) * _factor(change.second) * change.scale**2
        case Hadamard():
            return _whole(change.difference(_CPU))
        case Decomposed():
            return squared_norm(change.change)
        case Rows():
            return math.fsum(squared_norm(part.change) for part in change.parts)
        case _:
            raise TypeError(f"no norm is known of {type(change).__name__}")


def largest_value(change: Change) -> float:
    """A bound on every |Δ| at multiplier 1, and on what is multiplied on the way there; 0 where nothing changes.

    It takes one look at each factor, and may be far above the largest |Δ| itself.
    """
    match change:
        case LowRank():
            product = _most(change.up) * _most(change.down) * change.rank
            return _scaled(product, change.scale)
        case Full():
            return _scaled(_most(change.values), change.scale)
        case Kronecker() | Hadamard():
            return _scaled(_factor_most(change.first) * _factor_most(change.second), change.scale)
        case Decomposed():  # the magnitude counts even where the Δ below it is zero
            return max(largest_value(change.change), _most(change.magnitude), _LEAST)
        case Rows():
            return max(largest_value(part.change) for part in change.parts)
        case _:
            raise TypeError(f"no bound is known of {type(change).__name__}")


def value_count(change: Change) -> int:
    """How many of the parameter's values it changes."""
    if isinstance(change, Rows):
        return sum(value_count(part.change) for part in change.parts)
    return math.prod(change.shape)


def has_magnitude(change: Change) -> bool:
    """Whether DoRA scales the changed weight, or some of its rows."""
    if isinstance(change, Rows):
        return any(has_magnitude(part.change) for part in change.parts)
    return isinstance(change, Decomposed)


def alphas_of(change: Change) -> Iterator[float]:
    """The alphas that count in it; the rank where the file names none."""
    match change:
        case Rows():
            for part in change.parts:
                yield from alphas_of(part.change)
        case Decomposed():
            yield from alphas_of(change.change)
        case LowRank() | Kronecker() | Hadamard() if change.rank is not None:
            yield float(change.rank) if change.alpha is None else change.alpha


def _product(left: Tensor, right: Tensor) -> float:
    """‖L R‖² = Σ (LᵀL ∘ R Rᵀ), which takes rank² numbers rather than out · in."""
    left, right = left.double(), right.double()
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def _factor(factor: Factor) -> float:
    return _whole(factor.left) if factor.right is None else _product(factor.left, factor.right)


def _whole(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double())) ** 2


def _scaled(product: float, scale: float) -> float:
    """The larger of a product and its multiple, since either can be too large; 0 where the multiple is."""
    return 0.0 if product == 0 or scale == 0 else max(product, abs(scale), product * abs(scale))


def _factor_most(factor: Factor) -> float:
    if factor.right is None:
        return _most(factor.left)
    return _most(factor.left) * _most(factor.right) * factor.right.shape[0]


def _most(values: Tensor) -> float:
    """The largest |value|; 0 of no values."""
    if not values.numel():
        return 0.0
    least, most = torch.aminmax(values if values.dtype in _WITH_EXTREMES else values.float())
    return max(abs(float(least)), abs(float(most)))
