"""Samplers by name, as ComfyUI names them. They know no model, no device and no request; see `protocol`.

Which noise levels a sampler asks its model about depends on the schedule alone, so modulations can be made for all
of them before the first step: `evaluated_sigmas`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from chromarpc_server.pipeline.samplers.exponential import dpmpp_2m, res_multistep
from chromarpc_server.pipeline.samplers.multistep import deis, gradient_estimation, ipndm, ipndm_v, lms
from chromarpc_server.pipeline.samplers.protocol import Model, Sampler, SamplerStep
from chromarpc_server.pipeline.samplers.single_step import dpm_2, euler, heun, heunpp2
from chromarpc_server.pipeline.samplers.unipc import uni_pc, uni_pc_bh2

__all__ = ["SAMPLERS_BY_NAME", "Model", "NotComputable", "Sampler", "SamplerStep", "evaluated_sigmas"]

SAMPLERS_BY_NAME: Mapping[str, Sampler] = MappingProxyType(
    {
        "euler": euler,
        "ddim": euler,
        "heun": heun,
        "heunpp2": heunpp2,
        "dpm_2": dpm_2,
        "lms": lms,
        "dpmpp_2m": dpmpp_2m,
        "ipndm": ipndm,
        "ipndm_v": ipndm_v,
        "deis": deis,
        "res_multistep": res_multistep,
        "gradient_estimation": gradient_estimation,
        "uni_pc": uni_pc,
        "uni_pc_bh2": uni_pc_bh2,
    }
)
"""Of a flow, DDIM's step is Euler's."""


class NotComputable(ArithmeticError):
    """A sampler's coefficients are no numbers over a schedule: its levels are too close together, or to 0."""


def evaluated_sigmas(sampler: Sampler, sigmas: Sequence[float]) -> list[float]:
    """The noise level of every call of the model, in order.

    Raises:
        NotComputable: what it draws over these levels would be no image.
    """
    asked: list[float] = []

    def model(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return x

    with np.errstate(all="ignore"):
        try:
            is_finite = all(bool(step.x.isfinite()) for step in sampler(model, torch.zeros(1), sigmas))
        except (ArithmeticError, ValueError) as error:  # of numpy's linear algebra, the latter
            raise NotComputable(str(error)) from None
    if not is_finite:
        raise NotComputable("not finite")
    return asked
