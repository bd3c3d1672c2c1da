"""Samplers that carry slopes of earlier steps forward: each extrapolates them over the step that it takes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from chromarpc_server.pipeline.samplers.protocol import Model, SamplerStep, slope

ORDER = 4
DEIS_ORDER = 3
_DEIS_POINTS = 10_000
"""At which the integral of a coefficient is summed up."""
_VP_MIN, _VP_MAX, _VP_EPSILON = 0.002, 80.0, 1e-3
"""Noise levels and first time of the variance-preserving process that DEIS works in."""
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

Weights = Callable[[Sequence[float], int], Sequence[float]]
"""(noise levels, step) → by how much each slope, the newest first, moves x in this step."""


def _weighted(
    model: Model, x: Tensor, sigmas: Sequence[float], order: int, weights: Weights, *, last_is_exact: bool
) -> Iterator[SamplerStep]:
    """Adds Σ weight · slope in each step, over at most `order` slopes.

    `last_is_exact`: the step to 0 gives the predicted x0.
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        slopes.appendleft(slope(x, sigma, denoised))
        if last_is_exact and following == 0:
            x = denoised
        else:
            given = weights(sigmas, index)
            moved = slopes[0] * given[0]
            for older, weight in zip(list(slopes)[1:], given[1:], strict=False):
                moved = moved + older * weight
            x = x + moved
        yield SamplerStep(x, denoised)


def lms(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """Linear multistep: the polynomial through the last four slopes, integrated over the step."""
    return _weighted(model, x, sigmas, ORDER, lambda all_, i: _interpolated(all_, i, ORDER), last_is_exact=True)


def ipndm(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """Adams and Bashforth's weights, as if all steps were equal (arXiv 2204.13902)."""
    return _weighted(model, x, sigmas, ORDER, _adams_bashforth, last_is_exact=True)


def ipndm_v(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """The same with weights for steps of any size, as its authors' program has them."""
    return _weighted(model, x, sigmas, ORDER, _uneven, last_is_exact=True)


def deis(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """DEIS (arXiv 2204.13902), its table of coefficients computed in the time of a variance-preserving process."""
    return _weighted(model, x, sigmas, DEIS_ORDER, _deis_weights, last_is_exact=True)


def gradient_estimation(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """Euler with 2·d − d of the step before for its slope (arXiv 2306.04848, γ = 2)."""

    def weights(all_: Sequence[float], index: int) -> Sequence[float]:
        step = all_[index + 1] - all_[index]
        return (step,) if index == 0 else (2 * step, -step)

    return _weighted(model, x, sigmas, 2, weights, last_is_exact=True)


def _adams_bashforth(sigmas: Sequence[float], index: int) -> Sequence[float]:
    step = sigmas[index + 1] - sigmas[index]
    return [step * weight for weight in _ADAMS_BASHFORTH[min(index, ORDER - 1)]]


def _uneven(sigmas: Sequence[float], index: int) -> Sequence[float]:
    """Adams and Bashforth's weights for uneven steps, by Newton's differences: h the step, h1 … those before it.

    `second` and `third` weigh the differences of second and third order. The exact integrals would be another
    number each; those of the published program, which everybody draws with, are these.
    """
    steps = [sigmas[index + 1 - k] - sigmas[index - k] for k in range(min(index + 1, ORDER))]
    step = steps[0]
    if index == 0:
        return [step]
    h, h1, *earlier = steps
    first = h / h1 / 2
    if not earlier:
        return [step * (1 + first), step * -first]
    h2 = earlier[0]
    second = (1 - h * h / (3 * h1 * (h1 + h2))) / 2
    back = h1 / h2
    if len(earlier) == 1:
        return [step * weight for weight in (1 + first + second, -first - (1 + back) * second, back * second)]
    h3 = earlier[1]
    inner = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    third = inner * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    further = h1 * (h1 + h2) / (h2 * (h2 + h3))
    weights = (
        1 + first + second + third,
        -first - (1 + back) * second - (1 + back + further) * third,
        back * second + (back + further * (1 + h2 / h3)) * third,
        -further * back * third,
    )
    return [step * weight for weight in weights]


def _interpolated(sigmas: Sequence[float], index: int, order: int) -> Sequence[float]:
    """∫ of each Lagrange polynomial over the step, exactly."""
    known = [sigmas[index - k] for k in range(min(index + 1, order))]
    return [_integral(known, j, sigmas[index], sigmas[index + 1]) for j in range(len(known))]


def _integral(known: Sequence[float], j: int, start: float, stop: float) -> float:
    """∫ Π (t − known_k) / (known_j − known_k) dt over k ≠ j."""
    polynomial = [1.0]
    for k, at in enumerate(known):
        if k == j:
            continue
        scale = known[j] - at
        # Times (t − at), in powers of t − start, where the numbers are small.
        root = at - start
        shifted = [0.0, *polynomial]
        polynomial = [(high - root * low) / scale for high, low in zip(shifted, [*polynomial, 0.0], strict=True)]
    step = stop - start
    return sum(factor * step ** (power + 1) / (power + 1) for power, factor in enumerate(polynomial))


class _VariancePreserving:
    """The time of a variance-preserving process by its noise level, and DEIS's integrand there.

    Coefficients come out as the published program gives them, whose constants and integrals are in float32 and
    whose times are in float64: other roundings give coefficients that are 1e-7 apart.
    """

    def __init__(self) -> None:
        low = math.log(float(torch.tensor(_VP_MIN) ** 2 + 1))
        high = math.log(float(torch.tensor(_VP_MAX) ** 2 + 1))
        epsilon = float(torch.tensor(_VP_EPSILON))
        self.slope = 2 * (low / epsilon - high) / (epsilon - 1)
        self.least = high - self.slope / 2

    def times(self, sigmas: Sequence[float]) -> list[float]:
        """When these noise levels are reached."""
        inner = ((torch.tensor(sigmas, dtype=torch.float64) ** 2 + 1).log() * (2 * self.slope)).tolist()
        return [(math.sqrt(self.least**2 + value) - self.least) / self.slope for value in inner]

    def integrand(self, times: Tensor) -> Tensor:
        """−½ · d ln α / dt / √(α (1 − α)) with α = exp(−½ t² · slope − t · least). (n,) float32."""
        alpha = torch.exp(-0.5 * times**2 * self.slope - times * self.least)
        unit = 1 / alpha * alpha  # of the derivative of a logarithm, as it is rounded there
        decay = unit * self.slope * -0.5 * (2 * times) - unit * self.least
        return -0.5 * decay / torch.sqrt(alpha * (1 - alpha))


def _deis_weights(sigmas: Sequence[float], index: int) -> Sequence[float]:
    if index == 0:
        return [sigmas[1] - sigmas[0]]
    process = _VariancePreserving()
    times = process.times(sigmas)
    at = torch.linspace(times[index], times[index + 1], _DEIS_POINTS)
    width = (times[index + 1] - times[index]) / _DEIS_POINTS
    integrand = process.integrand(at)
    known = [times[index - k] for k in range(min(index + 1, DEIS_ORDER))]
    found = []
    for j, own in enumerate(known):
        polynomial = torch.ones(())
        for k, other in enumerate(known):
            if k != j:
                polynomial = polynomial * ((at - other) / (own - other))
        found.append(float(torch.sum(integrand * polynomial)) * width)
    return found
