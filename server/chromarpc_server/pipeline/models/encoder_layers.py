"""Layers of a text encoder whose weights are held otherwise than transformers has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.pipeline.fused.check import fused_ops


class ScaledLinear(nn.Module):
    """A linear layer without bias whose rounded product is scaled afterwards, as torchao's `int8` does."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        """`codes` (out, in) in the dtype that is computed in, `scale` (out,)."""
        super().__init__()
        self.weight = None
        self.codes = nn.Buffer(codes)
        self.scale = nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return F.linear(x, self.codes) * self.scale


class Float8Linear(nn.Module):
    """A linear layer whose float8 weight is dequantized at every call: half the memory, the same bits.

    It has no `weight` that the library could take a dtype from.
    """

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """`q` (out, in) float8, `scale` (out,) in the dtype it was quantized in; `dtype` to compute in."""
        super().__init__()
        self.weight = None
        self.q = nn.Buffer(q)
        self.scale = nn.Buffer(scale)
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        weight = torch.empty(self.q.shape, dtype=self._dtype, device=x.device)
        return F.linear(x, fused_ops(x.device).dequantize(self.q, self.scale, weight))


class HostEmbedding(nn.Module):
    """A table of embeddings in host memory: the rows of a prompt's tokens are copied to the device."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        """`table` (vocabulary, width), on the host; `device`: where its rows are wanted."""
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, dtype=table.dtype, device=device), requires_grad=False)
        """Nothing: a model is taken to be on the device of its first parameter."""
        self.table = nn.Buffer(table)

    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, width) on the device."""
        return F.embedding(ids.cpu(), self.table).to(self.place.device)
