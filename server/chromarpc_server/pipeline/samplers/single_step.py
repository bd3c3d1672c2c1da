"""Samplers that look at nothing but the step they take: Euler, Heun and their like (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from chromarpc_server.pipeline.samplers.protocol import Model, SamplerStep, slope


def euler(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """Follows the slope where the step begins."""
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        x = x + slope(x, sigma, denoised) * (following - sigma)
        yield SamplerStep(x, denoised)


def heun(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """The mean of the slopes at both ends; Euler's step to 0."""
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        here = slope(x, sigma, denoised)
        if following == 0:
            x = x + here * (following - sigma)
        else:
            there = _slope_ahead(model, x, here, sigma, following)
            x = x + (here + there) / 2 * (following - sigma)
        yield SamplerStep(x, denoised)


def heunpp2(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """Heun with up to three slopes, each of which weighs as its noise level does beside the run's first."""
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        here = slope(x, sigma, denoised)
        left = len(sigmas) - 2 - index
        if left == 0:
            x = x + here * (following - sigma)
            yield SamplerStep(x, denoised)
            continue
        ahead = x + here * (following - sigma)
        second = slope(ahead, following, model(ahead, following))
        if left == 1:
            share = following / (2 * sigmas[0])
            mean = here * (1 - share) + second * share
        else:
            after = sigmas[index + 2]
            further = ahead + second * (after - following)
            third = slope(further, after, model(further, after))
            shares = following / (3 * sigmas[0]), after / (3 * sigmas[0])
            mean = here * (1 - sum(shares)) + second * shares[0] + third * shares[1]
        x = x + mean * (following - sigma)
        yield SamplerStep(x, denoised)


def dpm_2(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """The slope in the middle, by logarithms (arXiv 2206.00927); Euler's step to 0."""
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        here = slope(x, sigma, denoised)
        if following == 0:
            x = x + here * (following - sigma)
        else:
            middle = math.exp((math.log(sigma) + math.log(following)) / 2)
            x = x + _slope_ahead(model, x, here, sigma, middle) * (following - sigma)
        yield SamplerStep(x, denoised)


def _slope_ahead(model: Model, x: Tensor, here: Tensor, sigma: float, ahead: float) -> Tensor:
    """The slope where Euler's step to the level `ahead` comes to."""
    reached = x + here * (ahead - sigma)
    return slope(reached, ahead, model(reached, ahead))
