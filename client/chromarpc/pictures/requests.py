"""What would have to be said to a server to draw a picture of another program, as far as that can be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from chromarpc.pictures.facts import Fact
from chromarpc.request import DEFAULT_MODEL
from chromarpc.sampling import SAMPLERS, SCHEDULES

_PROMPT: Final = ("prompt", "width", "height", "sample_steps", "guidance_scale", "seed")
_LARGEST_SEED: Final = 2**63 - 1


def request_of(facts: Mapping[str, Fact], **more: Any) -> dict[str, Any]:
    """A request body with what is known; what is not is left to the server's defaults.

    Args:
        facts: of a picture.
        more: fields of the body.
    """
    prompt: dict[str, Any] = {"prompt": ""}
    for name in _PROMPT:
        value = _value(facts, name)
        if value is not None and not (name == "seed" and not 0 <= value <= _LARGEST_SEED):
            prompt[name] = value
    if negative := _value(facts, "neg"):
        prompt |= {"neg": negative, "use_neg": True}
    for name, told, known in (("sampler", "sampler", SAMPLERS), ("schedule", "scheduler", SCHEDULES)):
        if (value := _value(facts, told)) in known:
            prompt[name] = value
    if (shift := _value(facts, "shift")) is not None:
        prompt["shift"] = shift
    body: dict[str, Any] = {"model": DEFAULT_MODEL, **more, "prompts": [prompt]}
    if (settings := _value(facts, "settings")) is not None:
        body["settings"] = settings
    loras: list[dict[str, Any]] = []
    while (path := _value(facts, f"loras.{len(loras)}.path")) is not None:
        multiplier = _value(facts, f"loras.{len(loras)}.network_multiplier")
        loras.append({"path": path, **({} if multiplier is None else {"network_multiplier": multiplier})})
    return {**body, "loras": loras} if loras else body


def _value(facts: Mapping[str, Fact], name: str) -> Any:
    fact = facts.get(name)
    return None if fact is None else fact.value
