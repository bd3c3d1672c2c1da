"""Warnings about an adapter, the same from `InspectLora` as for a job that uses it."""

from __future__ import annotations

from collections.abc import Iterator

from chromarpc_server.domain.plan import PlanWarning
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.pipeline import Adapter
from chromarpc_server.pipeline.adapters import named, shown

_BASE_MODELS = ("ss_base_model_version", "modelspec.architecture")
"""Keys under which trainers name the model that they trained on: kohya's and ai-toolkit, then OneTrainer's."""
_FAMILY = "chroma"


def adapter_warnings(adapter: Adapter, field: str) -> Iterator[PlanWarning]:
    """The warnings, each blaming `field`."""
    bases = [base for key in _BASE_MODELS if (base := adapter.metadata.get(key))]
    if bases and not any(_FAMILY in base.lower() for base in bases):
        yield PlanWarning(
            WarningCode.LORA_FOR_ANOTHER_MODEL,
            field,
            f"the file says that it was trained on {shown(bases[0])}, not on Chroma",
        )
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
