"""LoHa (LyCORIS): the element-wise product of two low-rank products."""

from __future__ import annotations

from collections.abc import Mapping

from chromarpc_server.pipeline.adapters.change import Additive, Hadamard
from chromarpc_server.pipeline.adapters.kinds.kind import WEIGHT, Kind, KindError, Module

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _build(module: Module) -> Mapping[str, Additive]:
    first, second = module.product("hada_w1_a", "hada_w1_b"), module.product("hada_w2_a", "hada_w2_b")
    if first.shape != second.shape:
        raise KindError(f"hada_w1 gives {first.shape}, hada_w2 {second.shape}")
    return {WEIGHT: Hadamard(first, second, module.alpha(first.rank))}


KIND = Kind("LoHa", {f".{part}": part for part in _PARTS}, _build)
