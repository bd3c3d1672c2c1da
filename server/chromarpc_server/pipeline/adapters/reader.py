"""Adapter files to `Adapter`: a format is recognised by its keys, and its parser gives named changes.

Adding a format is one module with `NAME`, `recognises` and `parse`, and its entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid, first_named
from chromarpc_server.pipeline.adapters import low_rank_pairs
from chromarpc_server.pipeline.adapters.change import Change, LowRank
from chromarpc_server.pipeline.safetensors_file import SafetensorsError, all_finite, open_safetensors

MAX_FILE_BYTES = 8 * 1024**3
Parsed = tuple[dict[str, Change], list[str]]


@dataclass(frozen=True)
class Format:
    """One way in which trainers write adapters."""

    name: str
    recognises: Callable[[Iterable[str]], bool]
    parse: Callable[[Mapping[str, Tensor], Mapping[str, tuple[int, ...]]], Parsed]


FORMATS = (Format(low_rank_pairs.NAME, low_rank_pairs.recognises, low_rank_pairs.parse),)


@dataclass(frozen=True)
class Adapter:
    """A parsed adapter file; its tensors stay in host memory."""

    format: str
    sha256: str
    size_bytes: int
    matched: tuple[str, ...]
    """The file's keys that change something."""
    unmatched: tuple[str, ...]
    """The file's keys that change nothing in this model."""
    metadata: Mapping[str, str] = field(repr=False)
    """The file's own header metadata."""
    changes: Mapping[str, Change] = field(repr=False)
    """By parameter name."""

    @property
    def rank(self) -> int:
        """The largest rank of its low-rank pairs; 0 where it has none."""
        return max((change.rank for change in self.changes.values()), default=0)

    def apply(self, name: str, weight: Tensor, multiplier: float) -> Tensor:
        """The parameter's changed weight; `weight` itself where the adapter leaves it alone or is at 0."""
        change = self.changes.get(name)
        return weight if change is None or multiplier == 0 else change.apply(weight, multiplier)


def read_adapter(
    path: Path, targets: Mapping[str, tuple[int, ...]], *, check: Callable[[], None] = lambda: None
) -> Adapter:
    """Reads an adapter file that nobody vouches for.

    Args:
        path: the file.
        targets: the model's parameters, name to shape.
        check: called between pieces of work; may raise to stop.

    Raises:
        LoraInvalid: not safetensors, truncated, hostile, or with values that are not finite.
        LoraIncompatible: no key matches the model, or shapes differ.
    """
    try:
        file = open_safetensors(path)
        if file.size_bytes > MAX_FILE_BYTES:
            raise LoraInvalid(f"the file has {file.size_bytes} bytes, more than {MAX_FILE_BYTES}")
        matching = [known for known in FORMATS if known.recognises(file.tensors)]
        if not matching:
            raise LoraIncompatible(
                f"none of the file's {len(file.tensors)} keys is in a format this server knows, for example: "
                f"{first_named([key[:80] for key in file.tensors], 3)}"
            )
        tensors = {}
        for name, tensor in file.read():
            check()
            tensors[name] = tensor
        sha256 = file.sha256(check)
    except SafetensorsError as error:
        raise LoraInvalid(f"the file cannot be used: {error}") from None
    except OSError:
        raise LoraInvalid("the file cannot be read") from None
    form = matching[0]
    changes, used = form.parse(tensors, targets)
    keys = set(used)
    unmatched = tuple(name for name in file.tensors if name not in keys)
    if not changes:
        raise LoraIncompatible(
            f"recognised as {form.name}, but none of its {len(file.tensors)} keys matches this model, "
            f"for example: {first_named([key[:80] for key in unmatched], 3)}"
        )
    _require_shapes(changes, targets)
    _require_finite({name: tensors[name] for name in used})
    return Adapter(
        format=form.name,
        sha256=sha256,
        size_bytes=file.size_bytes,
        matched=tuple(used),
        unmatched=unmatched,
        metadata=MappingProxyType(dict(file.metadata)),
        changes=MappingProxyType(changes),
    )


def _require_shapes(changes: Mapping[str, Change], targets: Mapping[str, tuple[int, ...]]) -> None:
    wrong = []
    for name, change in changes.items():
        if isinstance(change, LowRank) and change.up.shape[1] != change.down.shape[0]:
            wrong.append(f"{name} (ranks {change.up.shape[1]} and {change.down.shape[0]})")
        elif change.delta_shape() != tuple(targets[name]):
            wrong.append(f"{name} (is {change.delta_shape()}, should be {tuple(targets[name])})")
    if wrong:
        raise LoraIncompatible(f"shapes differ from this model's in {len(wrong)} modules: {first_named(wrong, 5)}")


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise LoraInvalid(f"values that are not finite in {first_named(bad, 5)}")
