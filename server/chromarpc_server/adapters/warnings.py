"""Warnings about an adapter, the same from `InspectLora` as for a job that uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from chromarpc_server.domain.base_names import is_of_family, is_other_base, is_same_base, known_base
from chromarpc_server.domain.plan import PlanWarning
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.pipeline import Adapter
from chromarpc_server.pipeline.adapters import named, shown

_ARCHITECTURES = ("ss_base_model_version", "modelspec.architecture")
"""Keys under which trainers name the kind of model that they trained on: kohya's, ai-toolkit; OneTrainer's.
Of ai-toolkit there is no more than this, and it is the same for every checkpoint of Chroma."""
_BASES = ("ss_sd_model_name", "ss_pretrained_model_name_or_path", "ss_base_model", "base_model", "name_or_path")
"""Keys of the checkpoint itself: kohya's; the rest what people have ai-toolkit write by `meta` of its config."""
_BASES_IN_CONFIGS = ("name_or_path", "base_model_name", "base_model_name_or_path", "pretrained_model_name_or_path")
"""The same inside a config that the header carries as JSON: ai-toolkit's, OneTrainer's, PEFT's, diffusers'."""
_MAX_CONFIG = 256 * 1024
"""Characters of a value that is looked into."""
_MAX_DEPTH = 8


def adapter_warnings(adapter: Adapter, field: str, base_name: str = "") -> Iterator[PlanWarning]:
    """The warnings, each blaming `field`.

    `base_name`: what adapters for the model that draws name as their base; empty where nobody says.
    """
    architectures = [name for key in _ARCHITECTURES if (name := adapter.metadata.get(key))]
    if architectures and not any(map(is_of_family, architectures)):
        yield PlanWarning(
            WarningCode.LORA_FOR_ANOTHER_MODEL,
            field,
            f"the file says that it was trained on {shown(architectures[0])}, not on Chroma",
        )
    else:
        yield from _base_warnings(adapter.metadata, field, base_name)
    if not adapter.has_effect:
        yield PlanWarning(
            WarningCode.LORA_WITHOUT_EFFECT, field, "every change is zero, as in a file that was never trained"
        )
    for part in adapter.unsupported:
        yield PlanWarning(
            WarningCode.LORA_PART_UNSUPPORTED,
            field,
            f"{len(part.keys)} keys are {part.name}, which this server does not apply",
        )
    if adapter.unmatched:
        total = len(adapter.matched) + len(adapter.unmatched)
        yield PlanWarning(
            WarningCode.LORA_KEYS_UNMATCHED,
            field,
            f"{len(adapter.unmatched)} of the file's {total} keys have no effect",
        )
    if adapter.unused_alphas:
        yield PlanWarning(
            WarningCode.LORA_ALPHA_NOT_FINITE,
            field,
            f"{len(adapter.unused_alphas)} alphas are not finite numbers, such as "
            f"{shown(adapter.unused_alphas[0])}; they do not count here, but other programs may use them",
        )
    if adapter.unread_scales:
        yield PlanWarning(
            WarningCode.LORA_SCALE_UNREAD,
            field,
            "the file's header gives scales that this server cannot follow, so that the adapter may be too strong "
            f"or too weak: {named(map(shown, adapter.unread_scales))}",
        )


def _base_warnings(metadata: Mapping[str, str], field: str, base_name: str) -> Iterator[PlanWarning]:
    bases = [*(metadata[key] for key in _BASES if metadata.get(key)), *_in_configs(metadata)]
    bases += [name for key in _ARCHITECTURES if (name := metadata.get(key)) and known_base(name)]
    others = [base for base in bases if is_other_base(base, base_name)]
    if others and not any(is_same_base(base, base_name) for base in bases):
        yield PlanWarning(
            WarningCode.LORA_FOR_ANOTHER_BASE,
            field,
            f"the file says that it was trained on {shown(others[0])}, and this model's base is "
            f"{shown(base_name)}: it may look weaker or otherwise than in training",
        )


def _in_configs(metadata: Mapping[str, str]) -> Iterator[str]:
    for value in metadata.values():
        if value[:1] in ("{", "[") and len(value) <= _MAX_CONFIG:
            try:
                config = json.loads(value)
            except (ValueError, RecursionError):
                continue
            yield from _bases_in(config, "", _MAX_DEPTH)


def _bases_in(config: object, owner: str, depth: int) -> Iterator[str]:
    """Names of base models in a config; `name_or_path` means one inside `model` alone."""
    if not depth:
        return
    if isinstance(config, list):
        for item in config:
            yield from _bases_in(item, owner, depth - 1)
    elif isinstance(config, dict):
        for key, value in config.items():
            is_base = key.rpartition(".")[2] in _BASES_IN_CONFIGS and (key != "name_or_path" or owner == "model")
            if is_base and isinstance(value, str) and value:
                yield value
            else:
                yield from _bases_in(value, key, depth - 1)
