"""UniPC (arXiv 2302.04867), multistep, over predicted x0, of third order at most.

It works with a variance-preserving x: x / √(1 + σ²), whose α is 1 / √(1 + σ²) and whose λ is −ln σ. The last
level, 0, is taken for `LAST_SIGMA`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chromarpc_server.pipeline.samplers.protocol import Model, SamplerStep

LAST_SIGMA = 0.001
ORDER = 3


def uni_pc(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """With B(h) = h."""
    return _sample(model, x, sigmas, lambda h: h)


def uni_pc_bh2(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """With B(h) = e^h − 1."""
    return _sample(model, x, sigmas, math.expm1)


@dataclass(frozen=True)
class _Update:
    """The numbers of one step from level to level, before anything of x is known."""

    keep: float
    """Of x at the level before."""
    first: float
    """Of the newest predicted x0."""
    scale: float
    predictor: tuple[float, ...]
    """Of the differences between older predictions and the newest one."""
    corrector: tuple[float, ...]
    """The same, with that of the prediction at the new level last."""
    ratios: tuple[float, ...] = field(default=())
    """How far back the older predictions lie, in steps: below 0."""


def _update(levels: Sequence[_Marginal], to: int, order: int, curve: Callable[[float], float]) -> _Update:
    """The step to level `to`, by predictions at the `order` levels before it."""
    lambdas = [level.log_ratio for level in levels[to - order : to + 1]]
    step = lambdas[-1] - lambdas[-2]
    ratios = [(at - lambdas[-2]) / step for at in reversed(lambdas[:-2])]
    bent = curve(-step)
    powers = np.vander([*ratios, 1.0], order, increasing=True).T
    phi = math.expm1(-step) / -step - 1
    wanted = []
    for k in range(1, order + 1):
        wanted.append(phi * math.factorial(k) / bent)
        phi = phi / -step - 1 / math.factorial(k + 1)
    predictor = [0.5] if order == 2 else np.linalg.solve(powers[:-1, :-1], wanted[:-1]).tolist()
    corrector = [0.5] if order == 1 else np.linalg.solve(powers, wanted).tolist()
    alpha = levels[to].alpha
    return _Update(
        keep=levels[to].deviation / levels[to - 1].deviation,
        first=-alpha * math.expm1(-step),
        scale=-alpha * bent,
        predictor=tuple(predictor),
        corrector=tuple(corrector),
        ratios=tuple(ratios),
    )


@dataclass(frozen=True)
class _Marginal:
    """What a noise level is in the variance-preserving process.

    In float32, as everybody draws with it: at `LAST_SIGMA`, 1 − α² has lost most of its digits, and the last step
    depends on what is left of them.
    """

    alpha: float
    deviation: float
    log_ratio: float
    """λ = ln(α / deviation)."""

    @classmethod
    def of(cls, sigma: float) -> _Marginal:
        """Of one noise level."""
        log_alpha = 0.5 * torch.log(1 / (torch.tensor(sigma, dtype=torch.float32) ** 2 + 1))
        deviation = torch.sqrt(1 - torch.exp(2 * log_alpha))
        return cls(float(torch.exp(log_alpha)), float(deviation), float(log_alpha - torch.log(deviation)))


def _sample(
    model: Model, x: Tensor, sigmas: Sequence[float], curve: Callable[[float], float]
) -> Iterator[SamplerStep]:
    """`curve`: B(h), for h below 0."""
    reached = [*sigmas[:-1], sigmas[-1] or LAST_SIGMA]
    levels = [_Marginal.of(sigma) for sigma in reached]
    steps = len(levels) - 1
    highest = max(1, min(ORDER, steps - 1))
    known: list[Tensor] = []
    """Predictions, the newest one first."""
    scaled = x / math.sqrt(1 + reached[0] ** 2)
    pending: tuple[_Update, Tensor, list[Tensor]] | None = None
    for index in range(steps):
        denoised = model(scaled * math.sqrt(1 + reached[index] ** 2), reached[index])
        if pending is not None:
            update, base, differences = pending
            moves = [*differences, denoised - known[0]]
            scaled = _moved(base, moves, update.corrector, update.scale)
        known = [denoised, *known[: ORDER - 1]]
        to = index + 1
        order = to if to < highest else min(highest, steps + 1 - to)
        update = _update(levels, to, order, curve)
        base = scaled * update.keep + known[0] * update.first
        differences = [(older - known[0]) / back for older, back in zip(known[1:], update.ratios, strict=False)]
        scaled = _moved(base, differences, update.predictor, update.scale)
        pending = update, base, differences
        yield SamplerStep(scaled / levels[to].alpha, denoised)


def _moved(base: Tensor, differences: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    for difference, weight in zip(differences, weights, strict=True):
        base = base + difference * (weight * scale)
    return base
