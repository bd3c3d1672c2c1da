"""LoRA: a low-rank pair, under every name that trainers give its halves.

`lora_A` / `lora_B` is PEFT, diffusers and ai-toolkit; `lora_down` / `lora_up` is kohya, OneTrainer and LyCORIS.
ai-toolkit's full-rank training writes `lora_A.weight` alone, of the weight's own shape, with scale 1. PEFT's
`lora_bias` and ai-toolkit's `use_bias` put a bias on B, which adds to the module's bias with the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping

from chromarpc_server.pipeline.adapters.change import Additive, Full, LowRank
from chromarpc_server.pipeline.adapters.kinds.kind import BIAS, WEIGHT, Kind, KindError, Module

_DOWN, _UP, _UP_BIAS = "lora_A", "lora_B", "the bias of lora_B"


def _build(module: Module) -> Mapping[str, Additive]:
    down = module.matrix(_DOWN)
    if _UP not in module.parts and tuple(down.shape) == module.shape:
        return {WEIGHT: Full(down)}
    up = module.matrix(_UP)
    if up.shape[1] != down.shape[0]:
        raise KindError(f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} differ in rank")
    pair = LowRank(down, up, module.alpha(down.shape[0]))
    if _UP_BIAS not in module.parts:
        return {WEIGHT: pair}
    return {WEIGHT: pair, BIAS: Full(module.parts[_UP_BIAS], scale=pair.scale)}


KIND = Kind(
    "LoRA",
    {
        ".lora_A.weight": _DOWN,
        ".lora_A.default.weight": _DOWN,
        ".lora_A": _DOWN,
        ".lora_down.weight": _DOWN,
        ".lora.down.weight": _DOWN,
        ".lora_linear_layer.down.weight": _DOWN,
        ".lora_B.weight": _UP,
        ".lora_B.default.weight": _UP,
        ".lora_B": _UP,
        ".lora_up.weight": _UP,
        ".lora.up.weight": _UP,
        ".lora_linear_layer.up.weight": _UP,
        ".lora_B.bias": _UP_BIAS,
        ".lora_up.bias": _UP_BIAS,
    },
    _build,
)
