"""Full differences, as LyCORIS and ComfyUI write them: `diff` of a weight, `diff_b` of a bias."""

from __future__ import annotations

from collections.abc import Mapping

from chromarpc_server.pipeline.adapters.change import Additive, Full
from chromarpc_server.pipeline.adapters.kinds.kind import BIAS, WEIGHT, Kind, Module

_NAMES = {"diff": WEIGHT, "diff_b": BIAS}


def _build(module: Module) -> Mapping[str, Additive]:
    return {_NAMES[part]: Full(tensor) for part, tensor in module.parts.items()}


KIND = Kind("full difference", {".diff": "diff", ".diff_b": "diff_b"}, _build)
