"""What a sampler is: a generator over a model and falling noise levels that yields after every step.

σ is the noise level, from 1 (noise) to 0 (image). A model gives x0 as it is predicted from x at a level; a sampler
goes from level to level along dx/dσ = (x − x0) / σ. Levels are Python floats, so that no step waits for a device;
x stays in its own dtype, float32 where images are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Model = Callable[[Tensor, float], Tensor]
"""(x, noise level) → predicted x0, of the same shape and dtype."""


@dataclass(frozen=True)
class SamplerStep:
    """What one step, from a noise level to the next, came to."""

    x: Tensor = field(repr=False)
    """At the next level."""
    denoised: Tensor = field(repr=False)
    """X0 as it was predicted at the level the step began with."""


Sampler = Callable[[Model, Tensor, Sequence[float]], Iterator[SamplerStep]]
"""(model, x at the first level, noise levels) → one step for each level but the last."""


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dσ = (x − x0) / σ: of a flow, the velocity."""
    return (x - denoised) / sigma
