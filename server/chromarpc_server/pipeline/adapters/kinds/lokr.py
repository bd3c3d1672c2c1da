"""LoKr (LyCORIS): the Kronecker product of two matrices, each whole or low-rank."""

from __future__ import annotations

from collections.abc import Mapping

from chromarpc_server.pipeline.adapters.change import Additive, Kronecker
from chromarpc_server.pipeline.adapters.kinds.kind import WEIGHT, Kind, Module

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def _build(module: Module) -> Mapping[str, Additive]:
    first = module.factor("lokr_w1", "lokr_w1_a", "lokr_w1_b")
    second = module.factor("lokr_w2", "lokr_w2_a", "lokr_w2_b")
    return {WEIGHT: Kronecker(first, second, module.alpha(first.rank if second.rank is None else second.rank))}


KIND = Kind("LoKr", {f".{part}": part for part in _PARTS}, _build)
