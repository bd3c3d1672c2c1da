"""Exponential integrators of second order, which take predicted x0 forward in λ = −ln σ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from chromarpc_server.pipeline.samplers.protocol import Model, SamplerStep, slope


def dpmpp_2m(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""
    before: Tensor | None = None
    step_before = 0.0
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            x = denoised
        else:
            step = math.log(sigma) - math.log(following)
            guess = denoised
            if before is not None:
                share = step / (2 * step_before)  # 1 / 2r
                guess = denoised * (1 + share) - before * share
            x = x * (following / sigma) - guess * math.expm1(-step)
            step_before = step
        before = denoised
        yield SamplerStep(x, denoised)


def res_multistep(model: Model, x: Tensor, sigmas: Sequence[float]) -> Iterator[SamplerStep]:
    """The multistep form of the refined exponential solver of second order (arXiv 2308.02157)."""
    before: Tensor | None = None
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma)
        if before is None or following == 0:
            x = x + slope(x, sigma, denoised) * (following - sigma)
        else:
            step = math.log(sigma) - math.log(following)
            place = (math.log(sigma) - math.log(sigmas[index - 1])) / step  # of the step before: below 0
            first = math.expm1(-step) / -step
            second = (first - 1) / -step
            x = x * math.exp(-step) + (denoised * (first - second / place) + before * (second / place)) * step
        before = denoised
        yield SamplerStep(x, denoised)
