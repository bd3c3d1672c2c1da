"""From sorted keys and their tensors to changes of named weights, with every misfit collected by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid
from chromarpc_server.pipeline.adapters.change import Change, RowChange, Rows, Shape
from chromarpc_server.pipeline.adapters.keys import ModuleKeys, named, shown
from chromarpc_server.pipeline.adapters.kinds import KINDS, KindError, Module, dora
from chromarpc_server.pipeline.adapters.kinds.kind import WEIGHT
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
        self.damaged: list[str] = []
        self.shapes: list[str] = []

    def add(self, stem: str, error: KindError) -> None:
        (self.damaged if error.damaged else self.shapes).append(f"{shown(stem)}: {error}")

    def require_none(self) -> None:
        """Raises what was collected."""
        if self.damaged:
            raise LoraInvalid(f"the file is damaged in {len(self.damaged)} modules: {named(self.damaged)}")
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
            built.used += keys.values()
            built.values += keys.values()
            built.kinds.append(kind_name)
            built.namings.append(module.place.naming)
            if module.magnitude is not None and WEIGHT in changes:
                built.used.append(module.magnitude)
                built.values.append(module.magnitude)
                built.kinds.append(dora.NAME)
        if module.alpha is not None:
            built.used.append(module.alpha)
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
    def alpha(rank: int | None) -> float | None:
        if rank is None:
            return None
        return scales.alpha_of(module.stem, rank) if module.alpha is None else _alpha(tensors[module.alpha])

    weight = module.place.parameter(WEIGHT, targets)
    shape = module.place.shape(weight, targets) if weight is not None else ()
    parts = {part: tensors[key] for part, key in module.by_kind[kind_name].items()}
    changes = _KINDS[kind_name].build(Module(parts, alpha, shape))
    if module.magnitude is None or WEIGHT not in changes:
        return changes
    return {**changes, WEIGHT: dora.decompose(changes[WEIGHT], tensors[module.magnitude])}


def _alpha(tensor: Tensor) -> float:
    """An alpha that counts; one that does not is never looked at, and may be anything."""
    if tensor.numel() != 1:
        raise KindError(f"alpha is of shape {tuple(tensor.shape)}")
    alpha = float(tensor.to(torch.float64))
    if not math.isfinite(alpha):
        raise KindError(f"alpha is {alpha}", damaged=True)
    return alpha


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
    for (first, one), (second, other) in pairwise(spans):
        if second[0] < first[1]:
            raise LoraIncompatible(f"{shown(one)} and {shown(other)} change the same rows of {name}")
    ordered = sorted(pieces, key=lambda piece: piece.rows or whole)
    parts = (RowChange(*(piece.rows or whole), piece.change) for piece in ordered)
    return Rows(tuple(targets[name]), tuple(parts))
