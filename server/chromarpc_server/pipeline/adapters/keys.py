"""Sorts a file's keys: which module each belongs to, which part of which kind it is, and what has no effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chromarpc_server.domain.errors import LoraInvalid
from chromarpc_server.pipeline.adapters.change import Shape
from chromarpc_server.pipeline.adapters.kinds import KINDS, Kind, dora, unsupported
from chromarpc_server.pipeline.adapters.module_names import Place, places

ALPHA, MAGNITUDE = "alpha", "magnitude"
MAX_NAME = 100
"""Characters of a key that a message shows."""

_NONE = "keys of no known form"
_KIND_OF = {part: kind for kind in KINDS for part in kind.suffixes.values()}
_PARTS = {
    ".alpha": ALPHA,
    **dict.fromkeys(dora.SUFFIXES, MAGNITUDE),
    **{suffix: part for kind in KINDS for suffix, part in kind.suffixes.items()},
}
_SUFFIXES = tuple(sorted({*_PARTS, *unsupported.SUFFIXES}, key=len, reverse=True))


@dataclass(frozen=True)
class Unsupported:
    """Keys without effect whose purpose is known by name."""

    name: str
    """Such as `text encoder` or `OFT`."""
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ModuleKeys:
    """The keys of one module that has a place in the model."""

    stem: str
    """What the file calls it."""
    place: Place
    by_kind: Mapping[str, Mapping[str, str]]
    """Kind's name → part → key."""
    alpha: str | None
    magnitude: str | None

    def all_keys(self) -> list[str]:
        """All of them."""
        keys = [key for parts in self.by_kind.values() for key in parts.values()]
        return keys + [key for key in (self.alpha, self.magnitude) if key is not None]


@dataclass(frozen=True)
class SortedKeys:
    """A whole file's keys."""

    modules: tuple[ModuleKeys, ...]
    unsupported: tuple[Unsupported, ...]
    kinds_seen: tuple[str, ...]
    """Kinds that the keys' endings show, whether or not their modules are this model's."""


def shown(key: str) -> str:
    """A key as a message may carry it: printable and of bounded length."""
    return ascii(key)[1:-1] if len(key) <= MAX_NAME else ascii(key[: MAX_NAME - 1])[1:-1] + "..."


def named(items: Iterable[str], *, most: int = 20, characters: int = 700) -> str:
    """The first items, joined, as far as they fit into a message, and a count of the rest."""
    listed = list(items)
    taken: list[str] = []
    for item in listed[:most]:
        if taken and sum(map(len, taken)) + len(item) > characters:
            break
        taken.append(item)
    rest = len(listed) - len(taken)
    return ", ".join(taken) + (f" and {rest} more" if rest else "")


def sort_keys(keys: Iterable[str], targets: Mapping[str, Shape]) -> SortedKeys:
    """Sorts a file's keys against a model's parameters.

    Raises:
        LoraInvalid: the same part of the same module comes twice.
    """
    place_of = places(targets)
    groups: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    without_effect: dict[str, list[str]] = {}
    for key in keys:
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            without_effect.setdefault(unsupported.reason(key) or _NONE, []).append(key)
            continue
        stem = key.removesuffix(suffix)
        if suffix in unsupported.SUFFIXES:
            refused.setdefault(stem, unsupported.SUFFIXES[suffix])
        part = _PARTS.get(suffix, suffix)
        other = groups.setdefault(stem, {}).setdefault(part, key)
        if other != key:
            raise LoraInvalid(f"the file has the same part twice: {shown(other)} and {shown(key)}")
    modules: list[ModuleKeys] = []
    for stem, parts in groups.items():
        place = place_of.get(stem)
        by_kind: dict[str, dict[str, str]] = {}
        for part, key in parts.items():
            if part in _KIND_OF:
                by_kind.setdefault(_KIND_OF[part].name, {})[part] = key
        if stem in refused or place is None or not by_kind:
            name = refused.get(stem) or unsupported.reason(stem) or _NONE
            without_effect.setdefault(name, []).extend(parts.values())
        else:
            modules.append(ModuleKeys(stem, place, by_kind, parts.get(ALPHA), parts.get(MAGNITUDE)))
    return SortedKeys(
        modules=tuple(modules),
        unsupported=tuple(
            Unsupported(name, tuple(those)) for name, those in without_effect.items() if name != _NONE
        ),
        kinds_seen=tuple(kind.name for kind in KINDS if any(_has(parts, kind) for parts in groups.values())),
    )


def _has(parts: Mapping[str, str], kind: Kind) -> bool:
    return any(_KIND_OF.get(part) is kind for part in parts)
