"""Noise levels of a run by the name of their schedule, as ComfyUI counts them. The reference's own: `sampling`.

A checkpoint's noise levels lie in a table: level t of N is t/N, moved by a shift. AuraFlow's shift s gives
σ = s·t / (1 + (s − 1)·t) over a table of 1000; Flux's shift μ gives σ = e^μ / (e^μ + 1/t − 1) over one of 10 000.
A schedule picks levels of the table, or computes its own between the highest and the lowest one. Everything is
float32, as ComfyUI's tables are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from chromarpc_server.domain.sampling_choices import FLOWMATCH
from chromarpc_server.pipeline import sampling

COMFYUI_MU = 1.15
"""Flux's shift as ComfyUI has it for Chroma, whatever the image's size."""
AURA_LEVELS, FLUX_LEVELS = 1000, 10_000
BETA = 0.6
"""Both parameters of the distribution that `beta` follows (arXiv 2407.12173)."""
DROPS_PENULTIMATE = frozenset({"dpm_2", "uni_pc", "uni_pc_bh2"})
"""Samplers that get a schedule of one step more, and of it not the last level above 0: as a KSampler has it."""
_NO_NOISE = 1e-5
"""A level below it counts as the end, and no 0 is put behind it."""
_KARRAS_RHO = 7.0
_LINEAR_THRESHOLD = 0.025
"""Of `linear_quadratic`: noise taken off by the linear half (Mochi's)."""


@dataclass(frozen=True)
class NoiseLevels:
    """A table of noise levels."""

    count: int
    shift: Callable[[Tensor], Tensor]
    """From 0…1 to the noise level, (n,) float32 each."""

    @classmethod
    def aura(cls, shift: float, count: int = AURA_LEVELS) -> NoiseLevels:
        """AuraFlow's and SD3's: σ = s·t / (1 + (s − 1)·t)."""
        return cls(count, lambda t: t if shift == 1 else shift * t / (1 + (shift - 1) * t))

    @classmethod
    def flux(cls, mu: float, count: int = FLUX_LEVELS) -> NoiseLevels:
        """Flux's: σ = e^μ / (e^μ + 1/t − 1)."""
        factor = math.exp(mu)
        return cls(count, lambda t: factor / (factor + (1 / t - 1)))

    @cached_property
    def table(self) -> Tensor:
        """(count,) float32, rising."""
        return self.shift(torch.arange(1, self.count + 1, dtype=torch.float32) / self.count)

    @property
    def lowest(self) -> float:
        """The first of the table."""
        return float(self.table[0])

    @property
    def highest(self) -> float:
        """The last of the table: 1."""
        return float(self.table[-1])


def _simple(levels: NoiseLevels, steps: int) -> list[float]:
    stride = levels.count / steps
    return [*(float(levels.table[-1 - int(index * stride)]) for index in range(steps)), 0.0]


def _beta(levels: NoiseLevels, steps: int, alpha: float = BETA, beta: float = BETA) -> list[float]:
    from scipy import stats  # noqa: PLC0415 - slow to import, and nothing else needs it

    at = 1 - np.linspace(0, 1, steps, endpoint=False)
    indices = np.rint(stats.beta.ppf(at, alpha, beta) * (levels.count - 1)).astype(int).tolist()
    kept = [index for place, index in enumerate(indices) if place == 0 or index != indices[place - 1]]
    return [*(float(levels.table[index]) for index in kept), 0.0]


def _normal(levels: NoiseLevels, steps: int) -> list[float]:
    """Even steps from the highest to the lowest level, each moved by the shift once more, as ComfyUI does."""
    ends_itself = abs(float(levels.shift(torch.tensor([levels.lowest])))) <= _NO_NOISE
    at = torch.linspace(levels.highest, levels.lowest, steps + 1 if ends_itself else steps)
    found: list[float] = levels.shift(at).tolist()
    return found if ends_itself else [*found, 0.0]


def _sgm_uniform(levels: NoiseLevels, steps: int) -> list[float]:
    """The same with the lowest level left out; a 0 is put behind whatever comes before it."""
    at = torch.linspace(levels.highest, levels.lowest, steps + 1)[:-1]
    return [*levels.shift(at).tolist(), 0.0]


def _ddim_uniform(levels: NoiseLevels, steps: int) -> list[float]:
    ends_itself = abs(float(levels.table[1])) <= _NO_NOISE
    stride = max(levels.count // (steps + 1 if ends_itself else steps), 1)
    found: list[float] = levels.table[1::stride].flip(0).tolist()
    return found if ends_itself else [*found, 0.0]


def _karras(levels: NoiseLevels, steps: int) -> list[float]:
    """Equation 5 of arXiv 2206.00364."""
    high, low = levels.highest ** (1 / _KARRAS_RHO), levels.lowest ** (1 / _KARRAS_RHO)
    return [*((high + torch.linspace(0, 1, steps) * (low - high)) ** _KARRAS_RHO).tolist(), 0.0]


def _exponential(levels: NoiseLevels, steps: int) -> list[float]:
    logs = torch.linspace(math.log(levels.highest), math.log(levels.lowest), steps)
    return [*logs.exp().tolist(), 0.0]


def _kl_optimal(levels: NoiseLevels, steps: int) -> list[float]:
    """Section 3.2 of arXiv 2404.14507. It has no single step."""
    share = torch.arange(steps, dtype=torch.float32) / (steps - 1)
    angles = share * math.atan(levels.lowest) + (1 - share) * math.atan(levels.highest)
    return [*angles.tan().tolist(), 0.0]


def _linear_quadratic(levels: NoiseLevels, steps: int) -> list[float]:
    """Half of the steps take off `_LINEAR_THRESHOLD` evenly; the rest is a parabola that joins smoothly."""
    if steps == 1:
        return [levels.highest, 0.0]
    linear = steps // 2
    parabola = steps - linear
    slope = _LINEAR_THRESHOLD / linear
    missing = linear - _LINEAR_THRESHOLD * steps
    square = missing / (linear * parabola**2)
    straight = slope - 2 * missing / parabola**2
    offset = square * linear**2
    taken = [slope * index for index in range(linear)]
    taken += [square * index**2 + straight * index + offset for index in range(linear, steps)]
    found = torch.tensor([(1 - share) * levels.highest for share in (*taken, 1.0)], dtype=torch.float32)
    return found.tolist()


_BY_NAME: Mapping[str, Callable[[NoiseLevels, int], list[float]]] = MappingProxyType(
    {
        "simple": _simple,
        "beta": _beta,
        "normal": _normal,
        "sgm_uniform": _sgm_uniform,
        "ddim_uniform": _ddim_uniform,
        "kl_optimal": _kl_optimal,
        "linear_quadratic": _linear_quadratic,
        "karras": _karras,
        "exponential": _exponential,
    }
)


def table_sigmas(schedule: str, steps: int, levels: NoiseLevels) -> list[float]:
    """A schedule's levels, falling, over a table: steps + 1 of them, or what the schedule makes of so many.

    Args:
        schedule: one of `SCHEDULES`, but not the reference's.
        steps: 1 or more; `kl_optimal` needs 2.
        levels: the table.

    Raises:
        ValueError: no such schedule, or too few steps for it.
    """
    found = _BY_NAME.get(schedule)
    if found is None:
        raise ValueError(f"no schedule {schedule!r}; there are {', '.join(_BY_NAME)}")
    least = 2 if schedule == "kl_optimal" else 1
    if steps < least:
        raise ValueError(f"{schedule} needs {least} steps or more, got {steps}")
    return found(levels, steps)


def beta_sigmas(steps: int, levels: NoiseLevels, alpha: float, beta: float) -> list[float]:
    """`beta` with parameters of its own."""
    return _beta(levels, steps, alpha, beta)


def without_penultimate(sigmas: Sequence[float]) -> list[float]:
    """The schedule without the last level but one."""
    return [*sigmas[:-2], *sigmas[-1:]]


def table_sigmas_for(schedule: str, steps: int, levels: NoiseLevels, sampler: str) -> list[float]:
    """What a sampler gets in a KSampler: some are given one step more, without its penultimate level."""
    if sampler in DROPS_PENULTIMATE:
        return without_penultimate(table_sigmas(schedule, steps + 1, levels))
    return table_sigmas(schedule, steps, levels)


def denoise_sigmas(
    schedule: str, steps: int, levels: NoiseLevels, denoise: float, sampler: str = ""
) -> list[float]:
    """The last `steps` steps of a schedule of steps / denoise: what an image-to-image run goes through.

    Args:
        schedule: as in `table_sigmas`.
        steps: that are taken.
        levels: the table.
        denoise: more than 0, at most 1.
        sampler: see `table_sigmas_for`.
    """
    whole = steps if denoise > 0.9999 else int(steps / denoise)
    return table_sigmas_for(schedule, whole, levels, sampler)[-(steps + 1) :]


def schedule_sigmas(
    schedule: str,
    steps: int,
    *,
    shift: float | None,
    image_tokens: int,
    sampler: str,
    mu: float = COMFYUI_MU,
) -> list[float]:
    """A run's noise levels, falling, the last one being 0.

    Args:
        schedule: one of `SCHEDULES`.
        steps: that were asked for.
        shift: AuraFlow's; None for the schedule's own: Flux's with `mu`, or the reference's by the image's size.
        image_tokens: N, of which only the reference's own shift makes use.
        sampler: some get one step more without its penultimate level, in ComfyUI's schedules.
        mu: of ComfyUI's schedules without a shift.

    Raises:
        ValueError: no such schedule, or too few steps for it.
    """
    if schedule == FLOWMATCH:
        at = np.linspace(1.0, 1 / steps, steps)
        if shift is not None:
            moved = shift * at / (1 + (shift - 1) * at)
        else:
            factor = math.exp(sampling.shift_mu(image_tokens))
            moved = factor / (factor + (1 / at - 1))
        return [*(float(np.float32(sigma)) for sigma in moved), 0.0]
    levels = NoiseLevels.flux(mu) if shift is None else NoiseLevels.aura(shift)
    return table_sigmas_for(schedule, steps, levels, sampler)
