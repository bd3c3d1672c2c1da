"""From sorted keys and their tensors to changes of named weights, with every misfit collected by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid
from chromarpc_server.pipeline.adapters.change import Change, RowChange, Rows, Shape
from chromarpc_server.pipeline.adapters.keys import ModuleKeys, named, shown
from chromarpc_server.pipeline.adapters.kinds import KINDS, KindError, Module, dora
from chromarpc_server.pipeline.adapters.kinds.kind import BIAS, WEIGHT
from chromarpc_server.pipeline.adapters.peft_metadata import PeftScales

_KINDS = {kind.name: kind for kind in KINDS}


@dataclass
class Built:
    """What a file's keys became."""

    changes: dict[str, Change] = field(default_factory=dict)
    """By parameter name."""
    used: list[str] = field(default_factory=list)
    """Keys that have an effect."""
    values: list[str] = field(default_factory=list)
    """Those of them whose values enter the result: all but alphas."""
    namings: list[str] = field(default_factory=list)
    """One for each change of a module."""
    kinds: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """A change of a parameter or of some of its rows, and what the file calls the module."""

    stem: str
    rows: tuple[int, int] | None
    change: Change


class _Misfits:
    """What is wrong, collected so that an error names all of it."""

    def __init__(self) -> None:
        self.incomplete: list[str] = []
        self.shapes: list[str] = []

    def add(self, stem: str, error: KindError) -> None:
        (self.incomplete if error.incomplete else self.shapes).append(f"{shown(stem)}: {error}")

    def require_none(self) -> None:
        """Raises what was collected."""
        if self.incomplete:
            raise LoraInvalid(f"{len(self.incomplete)} modules lack a part: {named(self.incomplete)}")
        if self.shapes:
            raise LoraIncompatible(f"shapes do not fit in {len(self.shapes)} modules: {named(self.shapes)}")


def build_changes(
    modules: Sequence[ModuleKeys],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Shape],
    scales: PeftScales,
) -> Built:
    """Builds every module's changes.

    Args:
        modules: sorted keys.
        tensors: their values, on the CPU.
        targets: the model's parameters, name to shape.
        scales: alphas from the header, for modules that have none of their own.

    Raises:
        LoraInvalid: half a pair, or an alpha that is not a finite number where it counts.
        LoraIncompatible: shapes differ, or two sets of keys change the same weight.
    """
    built = Built()
    misfits = _Misfits()
    pieces: dict[str, list[_Piece]] = {}
    for module in modules:
        for kind_name, keys in module.by_kind.items():
            try:
                changes = _changes(module, kind_name, tensors, targets, scales)
                for what, change in changes.items():
                    parameter = _fit(module, what, change, targets)
                    pieces.setdefault(parameter, []).append(_Piece(module.stem, module.place.rows, change))
            except KindError as error:
                misfits.add(module.stem, error)
                continue
            built.values += keys.values()
            built.kinds.append(kind_name)
            built.namings.append(module.place.naming)
        built.used += module.keys()
        if module.magnitude is not None:
            built.values.append(module.magnitude)
            built.kinds.append(dora.NAME)
    misfits.require_none()
    built.changes = {name: _join(name, those, targets) for name, those in pieces.items()}
    return built


def _changes(
    module: ModuleKeys,
    kind_name: str,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Shape],
    scales: PeftScales,
) -> Mapping[str, Change]:
    weight = module.place.parameter(WEIGHT, targets)
    shape = module.place.shape(weight, targets) if weight is not None else ()
    parts = {part: tensors[key] for part, key in module.by_kind[kind_name].items()}
    alpha = _alpha(tensors[module.alpha]) if module.alpha is not None else None
    changes = dict(_KINDS[kind_name].build(Module(parts, alpha, shape)))
    change = changes.get(WEIGHT)
    if change is None:
        return changes
    if module.alpha is None and change.rank is not None:
        alpha = scales.alpha_of(module.stem, change.rank)
        changes = dict(_KINDS[kind_name].build(Module(parts, alpha, shape)))
        change = changes[WEIGHT]
    if change.rank is not None and alpha is not None and not _is_finite(alpha):
        raise LoraInvalid(f"alpha is {alpha} in {shown(module.stem)}")
    if module.magnitude is not None:
        changes[WEIGHT] = dora.decompose(change, tensors[module.magnitude])
    return changes


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise KindError(f"alpha is of shape {tuple(tensor.shape)}")
    return float(tensor.to(torch.float64))


def _is_finite(number: float) -> bool:
    return number - number == 0


def _fit(module: ModuleKeys, what: str, change: Change, targets: Mapping[str, Shape]) -> str:
    """The parameter that a change is for, once it was found to be of its shape."""
    parameter = module.place.parameter(what, targets)
    if parameter is None:
        raise KindError(f"changes a {what}, and the model's module has none")
    wanted = module.place.shape(parameter, targets)
    if change.shape != wanted:
        raise KindError(f"changes {change.shape}, the model's {what} is {wanted}")
    return parameter


def _join(name: str, pieces: Sequence[_Piece], targets: Mapping[str, Shape]) -> Change:
    """One change of one parameter: the only piece, or pieces of disjoint rows.

    Raises:
        LoraIncompatible: two pieces change the same rows; which should count is not ours to guess.
    """
    if len(pieces) == 1 and pieces[0].rows is None:
        return pieces[0].change
    whole = (0, targets[name][0])
    spans = sorted(((piece.rows or whole), piece.stem) for piece in pieces)
    for (first, one), (second, other) in zip(spans, spans[1:], strict=False):
        if second[0] < first[1]:
            raise LoraIncompatible(f"{shown(one)} and {shown(other)} change the same rows of {name}")
    ordered = sorted(pieces, key=lambda piece: piece.rows or whole)
    parts = (RowChange(*(piece.rows or whole), piece.change) for piece in ordered)
    return Rows(tuple(targets[name]), tuple(parts))


__all__ = ["BIAS", "Built", "build_changes"]
