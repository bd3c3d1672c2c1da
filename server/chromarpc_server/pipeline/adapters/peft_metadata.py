"""Scales that diffusers and PEFT keep in the header rather than in keys.

Since 0.34 diffusers writes the adapter's LoraConfig as JSON under `lora_adapter_metadata`, each option prefixed
with the component (`transformer.lora_alpha`); a file with such a header has no `.alpha` keys. Without it, alpha
is the rank. Patterns are compared as plain module names: PEFT would run them as regular expressions, which a file
that nobody vouches for does not get to do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY = "lora_adapter_metadata"
_COMPONENT = "transformer."
_MAX_BYTES = 1024 * 1024
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")
"""A module's name, its dots escaped or not."""


@dataclass(frozen=True)
class PeftScales:
    """What a header says about alpha."""

    alpha: float | None = None
    by_module: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    unread: tuple[str, ...] = ()
    """What it says that is not followed: not a number, or a pattern that is more than a module's name."""

    def alpha_of(self, stem: str, rank: int) -> float | None:
        """The alpha of a module such that alpha / rank is its scale; None where the header says nothing.

        Rank-stabilized LoRA scales by alpha / √rank.
        """
        name = stem.removeprefix(_COMPONENT)
        alpha = next(
            (value for module, value in self.by_module.items() if name == module or name.endswith(f".{module}")),
            self.alpha,
        )
        return alpha * math.sqrt(rank) if alpha is not None and self.rank_stabilized else alpha


def read_peft_scales(metadata: Mapping[str, str]) -> PeftScales:
    """The header's scales, or none where it has none; what cannot be followed is in `unread`."""
    text = metadata.get(KEY, "")
    if not text:
        return PeftScales()
    try:
        options = json.loads(text) if len(text) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        return PeftScales(unread=(KEY,))
    alpha, patterns = _option(options, "lora_alpha"), _option(options, "alpha_pattern")
    unread = [] if alpha is None or _number(alpha) is not None else ["lora_alpha"]
    if not isinstance(patterns, dict | None):
        unread.append("alpha_pattern")
    by_module = {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        module, number = pattern.removeprefix("^").removesuffix("$"), _number(value)
        if number is None or not _PLAIN.fullmatch(module):
            unread.append(f"alpha_pattern {pattern}")
        else:
            by_module[module.replace("\\.", ".")] = number
    return PeftScales(_number(alpha), by_module, _option(options, "use_rslora") is True, tuple(unread))


def _option(options: Mapping[str, object], name: str) -> object:
    return options.get(_COMPONENT + name, options.get(name))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or value != value:  # noqa: PLR0124
        return None
    return float(value)
