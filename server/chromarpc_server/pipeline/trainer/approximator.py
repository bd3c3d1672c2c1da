"""The modulation vectors of `preview`, made by the trainer's own sequence of operations.

A rounding error in a modulation is the same for every token, so it adds up where those of activations average out:
in float32 arithmetic the modulations alone would be most of the distance to the trainer's image. They depend on
the timestep only, and copying them bit for bit costs next to nothing.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.trainer.forward import APPROXIMATOR, make_modulations
from chromarpc_server.pipeline.trainer.paths import BesidePath
from chromarpc_server.pipeline.weights.quantizers import Bias


def in_approximator(name: str) -> bool:
    """Whether a parameter of this name takes part in making the modulations."""
    return name.startswith(f"{APPROXIMATOR}.")


def held_dtype(name: str, dtype: torch.dtype, modulation_dtype: torch.dtype) -> torch.dtype:
    """What `preview` holds a parameter in: its own dtype, but for what takes part in making the modulations."""
    return modulation_dtype if in_approximator(name) else dtype


class TrainerApproximator:
    """Runs a model's approximator as the trainer does. Holds no weights of its own; switches show at once."""

    def __init__(self, model: ChromaTransformer, dtype: torch.dtype) -> None:
        """`dtype`: what it computes in, and what its weights are held in."""
        self._model = model
        self._dtype = dtype
        self._biases: dict[str, Bias] = {}

    def put_bias(self, weight: str, bias: Bias) -> None:
        """Notes where the layer with this weight adds its bias."""
        self._biases[weight.removesuffix(".weight")] = bias

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Modulations of every step.

        On a CPU each by itself, so that they are the trainer's bits. On a GPU all together, in the same sequence
        of roundings: a product of more rows may sum in another order, and step by step they would cost 25 ms.

        Args:
            timesteps: (S,) in 0…1.

        Returns:
            (S, slots, C) in the timesteps' dtype; see `ChromaTransformer.modulations`.
        """
        gains = dict(self._model.named_parameters())
        steps = timesteps.to(self._dtype)
        parts = (steps,) if steps.is_cuda else steps.split(1)
        made = [make_modulations(self._model.config, self._linear, gains, part) for part in parts]
        return torch.cat(made).to(timesteps.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """As `TrainerLinear`, from a module that `Layer` keeps."""
        linear = cast("Linear", self._model.get_submodule(name))
        weight = linear.base_of(linear.weight)
        if self._biases[name] is Bias.FUSED:
            output = F.linear(x, weight, linear.bias)
        else:
            output = torch.matmul(x, weight.t()) + linear.bias
        if linear.down is not None:
            output = BesidePath(linear.down.float(), linear.adapter_up.float(), 1.0)(x, output)
        for path in linear.paths:
            output = path(x, output)
        return output
