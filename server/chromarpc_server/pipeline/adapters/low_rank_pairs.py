"""Low-rank pairs under native module names, as ai-toolkit writes them.

`diffusion_model.<module>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank), sometimes `<module>.alpha`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from chromarpc_server.pipeline.adapters.change import Change, LowRank

NAME = "ai-toolkit LoRA"
_PREFIX = "diffusion_model."
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


def recognises(keys: Iterable[str]) -> bool:
    """Whether any key is such a pair's."""
    return any(key.startswith(_PREFIX) and key.endswith(_DOWN) for key in keys)


def parse(
    tensors: Mapping[str, Tensor], targets: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Change], list[str]]:
    """Every complete pair whose module is the model's.

    Returns:
        Changes by parameter name, and the file's keys that they used.
    """
    changes: dict[str, Change] = {}
    used: list[str] = []
    for key in tensors:
        if not (key.startswith(_PREFIX) and key.endswith(_DOWN)):
            continue
        stem = key.removesuffix(_DOWN)
        up_key, alpha_key = stem + _UP, stem + _ALPHA
        target = stem.removeprefix(_PREFIX) + ".weight"
        down, up = tensors[key], tensors.get(up_key)
        if target not in targets or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] == 0:
            continue
        used += [key, up_key]
        alpha = None
        if alpha_key in tensors and tensors[alpha_key].numel() == 1:
            alpha = float(tensors[alpha_key])
            used.append(alpha_key)
        changes[target] = LowRank(down, up, alpha)
    return changes, used
