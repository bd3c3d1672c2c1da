"""What an adapter file is and what it does to a model, computed from files alone: no device is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.reading import read_checked
from chromarpc_server.adapters.warnings import adapter_warnings
from chromarpc_server.adapters.weight_norms import WeightNorms
from chromarpc_server.domain.plan import PlanWarning
from chromarpc_server.pipeline import Adapter, CheckpointFiles, WeightFiles, translate_memory_error
from chromarpc_server.pipeline.adapters import (
    alphas_of,
    has_magnitude,
    squared_norm,
    value_count,
)
from chromarpc_server.pipeline.models.stored_transformer import open_transformer

MAX_NUMBERS = 20
"""How many distinct ranks or alphas are reported."""
FIELD = "path"


@dataclass(frozen=True)
class BlockStrength:
    """How strongly an adapter at multiplier 1 changes one block of the model."""

    block: str
    """`double_blocks.3`; of a parameter in no block, its module's first name."""
    norm: float
    """‖Δ‖ in Frobenius' sense over the block's parameters."""
    rms: float
    """Root mean square of Δ's values; comparable between blocks of different sizes."""
    has_magnitude: bool
    """Whether DoRA scales the changed weights as well, which is not in the numbers."""
    relative_norm: float | None
    """‖Δ‖ / ‖W‖ over the block's parameters that are changed; None where those are all zero."""


@dataclass(frozen=True)
class AdapterInspection:
    """What an adapter is, for people who choose one."""

    format: str
    sha256: str
    size_bytes: int
    dtypes: tuple[str, ...]
    """Of the values that count: `BF16`."""
    ranks: tuple[int, ...]
    """Distinct, ascending, the first `MAX_NUMBERS`."""
    alphas: tuple[float, ...]
    """The same of the alphas that count; a rank where the file names none."""
    matched_keys: int
    unmatched_keys: tuple[str, ...] = field(repr=False)
    unsupported: Mapping[str, int]
    """What keys of a known purpose are for, and how many they are."""
    changed_parameters: int
    blocks: tuple[BlockStrength, ...] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    warnings: tuple[PlanWarning, ...]


def inspect_adapter(
    file: AdapterFile, files: CheckpointFiles, norms: WeightNorms, *, check: Callable[[], None] = lambda: None
) -> AdapterInspection:
    """Reads an adapter beside a model, of which only the header is read, and what `norms` does not know yet.

    Args:
        file: the adapter's.
        files: the model's.
        norms: of models' own parameters.
        check: called between pieces of work; may raise to stop.

    Raises:
        LoraInvalid, LoraIncompatible: as `read_adapter` does, blaming `path`; also for values that are not finite.
        LoraDamaged: its bytes are not those that its name stands for.
        LoraChanged: it is no longer the file that was found.
        WeightsInvalid: the model's file cannot be read.
        OutOfMemory: the host has too little.
    """
    try:
        model = open_transformer(files.transformer, WeightFiles())
        adapter = read_checked(file, model.shapes, check=check)
        squares = norms.squared(model.part, adapter.targets, check=check)
        return _describe(adapter, squares, check, files.base_name)
    except (RuntimeError, MemoryError) as error:
        out_of_memory = translate_memory_error(error)
        if out_of_memory is None:
            raise
        raise out_of_memory from None


@torch.inference_mode()
def _describe(
    adapter: Adapter, squares: Mapping[str, float], check: Callable[[], None], base_name: str
) -> AdapterInspection:
    """`squares`: ‖W‖² of each parameter that the adapter changes."""
    blocks = tuple(_blocks(adapter, squares, check))
    alphas = sorted({alpha for change in adapter.changes.values() for alpha in alphas_of(change)})
    return AdapterInspection(
        format=adapter.format,
        sha256=adapter.sha256,
        size_bytes=adapter.size_bytes,
        dtypes=adapter.dtypes,
        ranks=adapter.ranks[:MAX_NUMBERS],
        alphas=tuple(alphas[:MAX_NUMBERS]),
        matched_keys=len(adapter.matched),
        unmatched_keys=adapter.unmatched,
        unsupported={part.name: len(part.keys) for part in adapter.unsupported},
        changed_parameters=len(adapter.changes),
        blocks=blocks,
        metadata=adapter.metadata,
        warnings=tuple(adapter_warnings(adapter, FIELD, base_name)),
    )


def block_of(parameter: str) -> str:
    """The block that a parameter belongs to."""
    found = re.match(r"(?:\w+_blocks|distilled_guidance_layer\.layers)\.\d+", parameter)
    return found[0] if found else parameter.partition(".")[0]


def _blocks(adapter: Adapter, weights: Mapping[str, float], check: Callable[[], None]) -> Iterator[BlockStrength]:
    parameters: dict[str, list[str]] = {}
    for name in adapter.changes:
        parameters.setdefault(block_of(name), []).append(name)
    for block in sorted(parameters, key=_by_number):
        squares: list[float] = []
        for name in parameters[block]:
            check()
            squares.append(squared_norm(adapter.changes[name]))
        changes = [adapter.changes[name] for name in parameters[block]]
        square = math.fsum(squares)
        weight = math.fsum(weights[name] for name in parameters[block])
        yield BlockStrength(
            block=block,
            norm=math.sqrt(square),
            rms=math.sqrt(square / sum(map(value_count, changes))),
            has_magnitude=any(map(has_magnitude, changes)),
            relative_norm=math.sqrt(square / weight) if weight else None,
        )


def _by_number(block: str) -> tuple[str, int]:
    family, _, number = block.rpartition(".")
    return (family, int(number)) if number.isdigit() else (block, 0)
