"""The layers that blocks are built of: linear layers and normalisations, with explicit dtypes.

Where the reference relies on autocast, these cast by hand, to the same effect: linears multiply in the weights'
dtype, normalisations and the shift and scale after them are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that multiplies in its weights' dtype, whatever its input's.

    A float8 weight is dequantized at every call: `bf16(weight) · scale`, one scale for each output row.

    With `down` (rank, in), an adapter's path lies beside the weight: the weight is (out, in + rank), its last
    columns are the adapter's `up`, and the input is taken beside its own product with `down`; a float8 weight has
    its `up` apart.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.down: Tensor | None
        self.register_buffer("down", None, persistent=False)
        self.up: Tensor | None
        self.register_buffer("up", None, persistent=False)
        self.paths: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
        """Further paths beside the weight: each takes input and output, and adds its part to the output."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """(…, in) → (…, out) in the weights' dtype."""
        weight: Tensor = self.weight
        if self.scale is not None:
            weight = weight.to(self.scale.dtype) * self.scale[:, None]
        values = input.to(weight.dtype)
        if self.down is None:
            return self._with_paths(values, F.linear(values, weight, self.bias))
        narrow = F.linear(values, self.down)
        if self.up is None:
            return self._with_paths(values, F.linear(torch.cat((values, narrow), dim=-1), weight, self.bias))
        return self._with_paths(values, F.linear(values, weight, self.bias) + F.linear(narrow, self.up))

    def _with_paths(self, values: Tensor, output: Tensor) -> Tensor:
        for path in self.paths:
            output = path(values, output)
        return output

    @property
    def has_room_for_adapters(self) -> bool:
        """Whether the weight's last columns are an adapter's `up`."""
        return self.down is not None and self.up is None

    @property
    def adapter_up(self) -> Tensor:
        """The adapter's `up` (out, rank), wherever it is held.

        Raises:
            ValueError: no adapter lies beside the weight.
        """
        if self.down is None:
            raise ValueError("no adapter lies beside this layer")
        return self.weight[:, self.down.shape[1] :] if self.up is None else self.up

    def base_of(self, weight: Tensor) -> Tensor:
        """The weight without an adapter's columns. (out, in + rank) → (out, in)."""
        return weight if self.down is None or self.up is not None else weight[:, : self.down.shape[1]]


class RMSNorm(nn.Module):
    """x / rms(x) · scale, accumulated in float32 and returned in the input's dtype.

    On a GPU in bf16 it runs under autocast, because what autocast does with `rms_norm` is part of the
    reference's sequence of operations and changed inside torch: bf16 up to 2.11, float32 from 2.12.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → the same."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS).to(x.dtype)
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), NORM_EPS).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters over the last axis, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LN(x) + shift in float32; `1 + scale` in the modulation's own dtype."""
    return (1 + scale) * layer_norm(x) + shift
