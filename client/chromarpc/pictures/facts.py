"""What is known of how a picture was drawn, by the request's names, in the order of how much each explains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, TypeAlias

Value: TypeAlias = str | int | float | bool

OURS: Final = "chromarpc"
_ORDER: Final = (
    r"model",
    r"served_model",
    r"model_revision",
    r"loras\.\d+\.sha256",
    r"loras\.\d+\.path",
    r"prompt",
    r"tokens",
    r"profile",
    r"settings",
    r"dtype",
    r"trainer\..*",
    r"width",
    r"height",
    r"seed",
    r"noise_draw",
    r"sample_steps",
    r"sampler",
    r"scheduler",
    r"shift",
    r"guidance_scale",
    r"guidance",
    r"guidance_on_two_devices",
    r"loras\.\d+\.network_multiplier",
    r"loras\.\d+\.placement",
    r"loras\.\d+\..*",
    r"neg",
    r"tiled",
    r"output\..*",
    r"versions",
    r"versions\..*",
    r"stored_as",
    r"device",
)
ALWAYS_ASKED: Final = (
    "model",
    "model_revision",
    "prompt",
    "profile",
    "dtype",
    "width",
    "height",
    "seed",
    "noise_draw",
    "sample_steps",
    "sampler",
    "scheduler",
    "guidance_scale",
    "guidance",
    "neg",
    "versions",
    "device",
)
"""Of every picture; where nobody says, it is unknown rather than not there."""
_PATTERNS: Final = tuple(re.compile(pattern) for pattern in _ORDER)
_NAMES_OF_FILES: Final = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|bin)$", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """One thing that is known, or known to be unknown."""

    value: Value | None
    """None where nobody says."""
    note: str = ""
    """What else there is to know, such as why it is unknown."""
    same_as: Value | None = None
    """What is compared instead of the value, where programs have different words for the same thing."""

    @property
    def compared(self) -> Value | None:
        """What two pictures are compared by."""
        return self.value if self.same_as is None else self.same_as

    @property
    def shown(self) -> str:
        """The value for people."""
        return "unknown" if self.value is None else show(self.value)


UNKNOWN: Final = Fact(None)


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What is known of one picture."""

    program: str
    """That drew it, for people; empty where nobody says."""
    facts: Mapping[str, Fact] = field(repr=False)
    """By the request's names; `loras.0.path` and so on for adapters."""
    request: Mapping[str, Any] | None = field(default=None, repr=False)
    """A body that draws it again, as far as that can be said; None where it cannot."""
    remarks: tuple[str, ...] = ()
    """What the request cannot hold, and what was assumed; each a sentence."""
    urls: tuple[str, ...] = ()
    """From which the request has a server fetch adapters."""

    @property
    def is_ours(self) -> bool:
        """Whether a server of this project drew it and says so by its record."""
        return self.program.startswith(OURS)

    def get(self, name: str) -> Fact | None:
        """A fact; None where there is no such thing, rather than nobody who says."""
        if name in self.facts:
            return self.facts[name]
        is_open = name in ALWAYS_ASKED if self.is_ours else not (self.program and name.startswith("loras."))
        return UNKNOWN if is_open and not self._is_told(name) else None

    def _is_told(self, name: str) -> bool:
        return name == "versions" and any(other.startswith("versions.") for other in self.facts)

    def names(self) -> list[str]:
        """Of all facts, in order."""
        return in_order({*self.facts, *(name for name in ALWAYS_ASKED if not self._is_told(name))})


def in_order(names: Iterable[str]) -> list[str]:
    """Names of facts, the most telling first."""
    return sorted(names, key=lambda name: (_place(name), [_natural(part) for part in name.split(".")]))


def _place(name: str) -> int:
    return next((place for place, pattern in enumerate(_PATTERNS) if pattern.fullmatch(name)), len(_PATTERNS))


def _natural(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part)


def show(value: Value) -> str:
    """A value for people, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value == "":
        return '""'
    return f"{value}".replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def name_of_file(path: str) -> str:
    """What a model or an adapter is called, whatever folder it lies in and whatever its file ends in."""
    return _NAMES_OF_FILES.sub("", PurePosixPath(path.replace("\\", "/")).name)
