"""Adapter files that nobody vouches for, to `Adapter`: what of the model they change, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid
from chromarpc_server.pipeline.adapters.build import Built, build_changes
from chromarpc_server.pipeline.adapters.change import Change, LowRank, Rows, Shape
from chromarpc_server.pipeline.adapters.keys import SortedKeys, Unsupported, named, shown, sort_keys
from chromarpc_server.pipeline.adapters.kinds import dora
from chromarpc_server.pipeline.adapters.peft_metadata import read_peft_scales
from chromarpc_server.pipeline.adapters.strength import largest_value
from chromarpc_server.pipeline.progress import Check, never_stop
from chromarpc_server.pipeline.weights.safetensors_file import (
    Opener,
    SafetensorsFile,
    all_finite,
    open_safetensors,
)
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError

MAX_FILE_BYTES = 8 * 1024**3
MAX_CHANGE = 1e15
"""Of one weight, by its bound. What is trained stays a dozen orders below; DoRA's norms square it in float32."""
MAX_METADATA_ENTRIES = 100
MAX_METADATA_NAME = 200
MAX_METADATA_CHARACTERS = 16 * 1024
"""Of one value of the header's metadata, kept to be shown; the rest is cut."""


@dataclass(frozen=True)
class Adapter:
    """A parsed adapter file; its tensors stay in host memory."""

    format: str
    """Whose names and which kinds of change: `kohya LoRA`, `ai-toolkit LoKr`."""
    sha256: str
    """Of the file's bytes, hexadecimal."""
    size_bytes: int
    matched: tuple[str, ...]
    """The file's keys that change something."""
    unmatched: tuple[str, ...]
    """The file's keys that change nothing in this model."""
    unsupported: tuple[Unsupported, ...]
    """Those of the unmatched keys whose purpose is known by name."""
    dtypes: tuple[str, ...]
    """Distinct types of the values that enter the result, as the format names them: `BF16`."""
    unused_alphas: tuple[str, ...]
    """Keys of alphas that are not finite numbers and do not count, as in full-rank files."""
    has_effect: bool
    """Whether any weight changes; false of a file that was never trained, or whose alphas are all 0."""
    unread_scales: tuple[str, ...]
    """What the header says about scales and cannot be followed: alphas from there may be wrong."""
    metadata: Mapping[str, str] = field(repr=False)
    """The file's own header metadata, bounded in size."""
    changes: Mapping[str, Change] = field(repr=False)
    """By parameter name."""

    @property
    def held_bytes(self) -> int:
        """Of host memory: the file's tensors, and what was made of them once to lie beside weights."""
        derived = (change.derived_bytes for change in self.changes.values() if isinstance(change, LowRank | Rows))
        return self.size_bytes + sum(derived)

    @property
    def targets(self) -> frozenset[str]:
        """Names of the parameters that it changes."""
        return frozenset(self.changes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its low-rank factors, ascending."""
        return tuple(sorted({change.rank for change in self.changes.values() if change.rank is not None}))

    @property
    def rank(self) -> int:
        """The largest rank of its low-rank factors; 0 where it has none."""
        return max(self.ranks, default=0)

    def apply(self, name: str, weight: Tensor, multiplier: float) -> Tensor:
        """The parameter's changed weight.

        Args:
            name: the parameter.
            weight: its values on any device; they stay as they are.
            multiplier: how much of the change; below zero turns it around.

        Returns:
            A tensor of the same shape, dtype and device: `weight` itself where the adapter leaves it alone or the
            multiplier is 0, a new one otherwise.
        """
        change = self.changes.get(name)
        return weight if change is None or multiplier == 0 else change.apply(weight, multiplier)


def read_adapter(
    path: Path,
    targets: Mapping[str, Shape],
    *,
    opener: Opener | None = None,
    check: Check = never_stop,
) -> Adapter:
    """Reads an adapter file that nobody vouches for.

    Args:
        path: the file.
        targets: the model's parameters, name to shape.
        opener: opens the file, where the path alone is not to be trusted; whatever it raises is passed on.
        check: called between pieces of work; may raise to stop.

    Raises:
        LoraInvalid: not safetensors, truncated, hostile, half a pair, or with values that are not finite or whose
            product would not be.
        LoraIncompatible: no key matches the model, shapes differ, or two sets of keys change the same weight.
    """
    try:
        file = open_safetensors(path, opener)
        _require_size(file)
        keys = sort_keys(file.tensors, targets)
        if not keys.modules:
            raise LoraIncompatible(_nothing_matches(file, keys))
        wanted = {key for module in keys.modules for key in module.all_keys()}
        _require_floats(file, wanted)
        tensors, sha256 = file.load(wanted, check)
    except TensorFileError as error:
        raise LoraInvalid(f"the file cannot be used: {error}") from None
    except OSError:
        raise LoraInvalid("the file cannot be read") from None
    scales = read_peft_scales(file.metadata)
    built = build_changes(keys.modules, tensors, targets, scales)
    _require_finite({key: tensors[key] for key in built.values})
    largest = {name: largest_value(change) for name, change in built.changes.items()}
    _require_bounded(largest)
    used = set(built.used)
    return Adapter(
        format=_format(built),
        sha256=sha256,
        size_bytes=file.size_bytes,
        matched=tuple(key for key in file.tensors if key in used),
        unmatched=tuple(key for key in file.tensors if key not in used),
        unsupported=keys.unsupported,
        dtypes=tuple(sorted({file.tensors[key].dtype for key in built.values})),
        unused_alphas=tuple(
            module.alpha
            for module in keys.modules
            if module.alpha is not None and not all_finite(tensors[module.alpha])
        ),
        has_effect=any(largest.values()),
        unread_scales=scales.unread,
        metadata=MappingProxyType(_bounded(file.metadata)),
        changes=MappingProxyType(dict(built.changes)),
    )


def require_adapter_file(path: Path, opener: Opener | None = None) -> None:
    """Checks from its header and size alone that a file is an adapter's, whatever model it is for.

    Args:
        path: the file.
        opener: as for `read_adapter`.

    Raises:
        LoraInvalid: not safetensors, truncated, hostile, too large, or without any key of a known format.
    """
    try:
        file = open_safetensors(path, opener)
    except TensorFileError as error:
        raise LoraInvalid(f"the file cannot be used: {error}") from None
    _require_size(file)
    keys = sort_keys(file.tensors, {})
    if not keys.kinds_seen:
        raise LoraInvalid(_nothing_matches(file, keys))


def _require_size(file: SafetensorsFile) -> None:
    if file.size_bytes > MAX_FILE_BYTES:
        raise LoraInvalid(f"the file has {file.size_bytes} bytes, more than {MAX_FILE_BYTES}")


def _format(built: Built) -> str:
    """The most frequent naming, then its kinds, most frequent first."""
    naming = Counter(built.namings).most_common(1)[0][0]
    kinds = [kind for kind, _ in Counter(built.kinds).most_common()]
    if dora.NAME in kinds and set(kinds) == {dora.NAME, "LoRA"}:
        kinds = [dora.NAME]
    return f"{naming} {' + '.join(kinds)}"


def _nothing_matches(file: SafetensorsFile, keys: SortedKeys) -> str:
    examples = named([shown(key) for key in file.tensors], most=3)
    total = len(file.tensors)
    if keys.unsupported and sum(len(group.keys) for group in keys.unsupported) == total:
        held = ", ".join(f"{group.name} ({len(group.keys)} keys)" for group in keys.unsupported)
        return f"the file holds only what this server does not support: {held}; for example: {examples}"
    if not total:
        return "the file holds no tensors"
    if not keys.kinds_seen:
        return f"none of the file's {total} keys is in a format this server knows, for example: {examples}"
    kinds = " + ".join(keys.kinds_seen)
    return f"looks like {kinds}, but none of the file's {total} keys names a module of this model: {examples}"


def _require_floats(file: SafetensorsFile, wanted: Iterable[str]) -> None:
    bad = [shown(key) for key in wanted if not (file.tensors[key].is_floating_point or key.endswith(".alpha"))]
    if bad:
        raise LoraInvalid(f"values that are not floating-point numbers in {named(sorted(bad))}")


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [shown(key) for key, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise LoraInvalid(f"values that are not finite in {len(bad)} tensors: {named(bad)}")


def _require_bounded(largest: Mapping[str, float]) -> None:
    """Finite factors whose product is not would turn every image into noise, or none, without a word."""
    bad = [name for name, most in largest.items() if not most <= MAX_CHANGE]
    if bad:
        raise LoraInvalid(f"values or alphas so large that their products overflow, for {named(bad)}")


def _bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        _cut(key, MAX_METADATA_NAME): _cut(value, MAX_METADATA_CHARACTERS)
        for key, value in list(metadata.items())[:MAX_METADATA_ENTRIES]
    }


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
