"""Names of base models: which checkpoint of Chroma a trainer's metadata, a config or a file's name means."""

from __future__ import annotations

import re

from chromarpc_server.domain.models import CHROMA, REGISTRY, WEIGHT_SUFFIXES, ModelDefaults

FAMILY = "chroma"
_OTHER_FAMILIES = ("radiance", "zeta")
"""Models of the same author with another architecture; their names hold the family's."""
_NAMED = re.compile(r"chroma[ _-]?1?[ ._-]?(base|hd|flash)(?![a-z])")
_NUMBERED = re.compile(r"(?:chroma(?:[ _-]?unlocked)?[ _-]?|^)v[ ._-]?(\d{2})(?!\d)")
_OF_NUMBER = {48: "base"}
"""Numbered checkpoints that were published under a name as well."""
_FAMILY_ALONE = re.compile(r"(lodestones/)?chroma[ _-]?1?")
_PATH = re.compile(r"[\\/]+")


def is_of_family(name: str) -> bool:
    """Whether a name is one of Chroma's, and not of a model with another architecture."""
    lowered = name.lower()
    return FAMILY in lowered and not any(other in lowered for other in _OTHER_FAMILIES)


def known_base(name: str) -> str | None:
    """The published checkpoint that a file, a repository or a path is named after, as the hub has it.

    None where the name says none: a merge of somebody's, or no more than the family.
    """
    text = _last_part(name)
    if found := _NAMED.search(text):
        # Flash is distilled from HD, and some files name both.
        suffix = "Flash" if "flash" in text else {"base": "Base", "hd": "HD"}[found[1]]
        return f"lodestones/Chroma1-{suffix}"
    if found := _NUMBERED.search(text):
        if text.startswith("v") and FAMILY not in name.lower():
            return None
        number = int(found[1])
        return "lodestones/Chroma1-Base" if number in _OF_NUMBER else f"lodestones/Chroma/v{number}"
    return None


def base_name_of(name: str) -> str:
    """What adapters trained on a file of this name would name as their base."""
    return known_base(name) or _last_part(name, lower=False)


def usual_defaults(base_name: str) -> ModelDefaults:
    """Those of the built-in model with this base; the reference's where there is none."""
    known = known_base(base_name)
    return next(
        (spec.defaults for spec in REGISTRY.values() if known and spec.base_name == known), CHROMA.defaults
    )


def is_same_base(named: str, base_name: str) -> bool:
    """Whether a name that an adapter gives its base means the model of `base_name`."""
    return bool(base_name) and not _says_nothing(named) and _same(named, base_name)


def is_other_base(named: str, base_name: str) -> bool:
    """Whether a name that an adapter gives its base means another model than `base_name`.

    A name that says no more than the family, as ai-toolkit writes it, means none.
    """
    return bool(base_name) and not _says_nothing(named) and not _same(named, base_name)


def _says_nothing(named: str) -> bool:
    return not named.strip() or _FAMILY_ALONE.fullmatch(named.strip().lower()) is not None


def _same(named: str, base_name: str) -> bool:
    ours, theirs = known_base(base_name), known_base(named)
    if ours is not None or theirs is not None:
        return ours == theirs
    return _last_part(named) == _last_part(base_name)


def _last_part(name: str, *, lower: bool = True) -> str:
    """The last part of a path, without the suffix of a file of weights."""
    last = _PATH.split(name.strip().rstrip("\\/"))[-1]
    suffix = next((suffix for suffix in WEIGHT_SUFFIXES if last.lower().endswith(suffix)), "")
    stem = last[: len(last) - len(suffix)] if suffix else last
    return stem.lower() if lower else stem
