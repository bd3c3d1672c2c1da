"""How much memory adapters take beside the weights, before anything is written there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.adapters.change import Kronecker
from chromarpc_server.pipeline.trainer.layer import rank_bucket
from chromarpc_server.pipeline.trainer.paths import Placed, pair_of, place

WIDE = torch.float32.itemsize
"""Bytes of a value where factors lie as the trainer holds them."""


def padded_bytes(
    adapters: Sequence[tuple[Adapter, float]],
    linears: Mapping[str, tuple[int, ...]],
    settings: TrainerSettings,
    dtype_of: Callable[[str], torch.dtype],
    *,
    capacity: int = 0,
    in_float8: Collection[str] = (),
) -> int:
    """Of an adapter set in `preview`: factors padded to a bucket beside every layer, and each adapter's own `up`.

    A LoKr that is added to weights makes values that float8 does not have, so that these take more, too.

    Args:
        adapters: in order, with their multipliers.
        linears: the linear layers' weights, name to shape (out, in).
        settings: what the trainer's config says.
        dtype_of: what the layer with this weight is held in.
        capacity: ranks that there is room for already, which stays.
        in_float8: the weights that are held in float8 as long as nothing is added to them.
    """
    placement = place(adapters, tuple(linears), settings)
    beside = placement.beside
    widened = sum(
        math.prod(linears[name]) * (dtype_of(name).itemsize - 1) for name in placement.added if name in in_float8
    )
    bucket = max(capacity, rank_bucket(max((_rank(those) for those in beside.values()), default=0)))
    room = bucket * sum(sum(shape) * dtype_of(name).itemsize for name, shape in linears.items())
    pairs = [pair for those in beside.values() for placed in those if (pair := pair_of(placed.change)) is not None]
    ups = sum(pair.up.nbytes for pair in pairs)
    return room + ups + _kronecker_bytes(beside) + widened


def factor_bytes(
    adapters: Sequence[tuple[Adapter, float]], linears: Sequence[str], settings: TrainerSettings
) -> int:
    """Of an adapter set in `preview-exact`: factors as the trainer holds them, in float32."""
    beside = place(adapters, linears, settings).beside
    pairs = [pair for those in beside.values() for placed in those if (pair := pair_of(placed.change)) is not None]
    return sum((pair.down.numel() + pair.up.numel()) * WIDE for pair in pairs) + _kronecker_bytes(beside)


def _rank(those: Sequence[Placed]) -> int:
    return sum(pair.rank for placed in those if (pair := pair_of(placed.change)) is not None)


def _kronecker_bytes(beside: Mapping[str, Sequence[Placed]]) -> int:
    changes = [placed.change for those in beside.values() for placed in those]
    total = 0
    for change in changes:
        if isinstance(change, Kronecker):
            rows, columns = change.first.shape
            second = (change.second.left, change.second.right)
            total += (rows * columns + sum(factor.numel() for factor in second if factor is not None)) * WIDE
    return total
