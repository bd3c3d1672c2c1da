"""`comfyui/sigmas.json`: noise levels of every schedule over several tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chromarpc_server.pipeline.sampling import image_tokens, shift_mu
from chromarpc_server.pipeline.schedules import (
    NoiseLevels,
    beta_sigmas,
    denoise_sigmas,
    table_sigmas,
    table_sigmas_for,
)
from chromarpc_server.verify.report import Outcome, Reporter, Result

FLOAT32_STEP = 1.2e-7
_TABLES: Mapping[str, Callable[[float, int], NoiseLevels]] = {
    "ModelSamplingDiscreteFlow": NoiseLevels.aura,
    "ModelSamplingFlux": NoiseLevels.flux,
}
_DROPPING = "dpm_2"
"""Any sampler that gets its schedule without the penultimate level."""


_Pairs = list[tuple[Callable[[], Sequence[float]], Sequence[float]]]
"""What computes a schedule, and the schedule as it was recorded."""


def run(path: Path, reporter: Reporter, group: str) -> None:
    """One case for each schedule over each table, all of its step counts in it."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    parts: Mapping[str, Callable[[NoiseLevels, Any], dict[str, _Pairs]]] = {
        "sigmas": _plain,
        "sigmas_discarding_penultimate": _discarding,
        "beta": _beta,
        "denoise": _denoise,
        "variants": _ends,
    }
    for part, by_variant in recorded.items():
        if part == "_about":
            continue
        case = f"{group}/{path.stem}/{part}"
        if part not in parts:
            reporter.add(Result(case, Outcome.FAIL, note="no part that is known here"))
            continue
        for variant, entries in by_variant.items():
            facts = recorded["variants"][variant]
            for name, pairs in parts[part](_levels(facts), entries).items():
                label = f"{case}/{variant}{f' {name}' if name else ''}"
                reporter.guarded(label, partial(_judge, label, pairs, reporter))


def _levels(facts: Mapping[str, object]) -> NoiseLevels:
    table = _TABLES.get(str(facts["class"]))
    if table is None:
        raise ValueError(f"no table of noise levels is known for {facts['class']}")
    return table(float(str(facts["shift"])), int(str(facts["table"])))


def _ends(levels: NoiseLevels, facts: Mapping[str, float]) -> dict[str, _Pairs]:
    return {"": [(lambda: [levels.highest, levels.lowest], [facts["sigma_max"], facts["sigma_min"]])]}


def _plain(levels: NoiseLevels, entries: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, _Pairs]:
    return {
        schedule: [
            (partial(table_sigmas, schedule, int(steps), levels), sigmas) for steps, sigmas in found.items()
        ]
        for schedule, found in entries.items()
    }


def _discarding(levels: NoiseLevels, entries: Mapping[str, Sequence[float]]) -> dict[str, _Pairs]:
    return {
        "": [
            (partial(table_sigmas_for, "beta", int(steps), levels, _DROPPING), sigmas)
            for steps, sigmas in entries.items()
        ]
    }


def _beta(levels: NoiseLevels, entries: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, _Pairs]:
    return {
        name: [
            (partial(beta_sigmas, int(steps), levels, *(float(number) for number in name.split(","))), sigmas)
            for steps, sigmas in found.items()
        ]
        for name, found in entries.items()
    }


def _denoise(levels: NoiseLevels, entries: Mapping[str, Sequence[float]]) -> dict[str, _Pairs]:
    found: dict[str, _Pairs] = {}
    for name, sigmas in entries.items():
        steps, denoise = name.split("@")
        found[name] = [(partial(denoise_sigmas, "beta", int(steps), levels, float(denoise)), sigmas)]
    return found


def _judge(case: str, pairs: _Pairs, reporter: Reporter) -> None:
    worst, note = 0.0, f"{len(pairs)} schedules"
    for compute, expected in pairs:
        rel, said = furthest(compute(), expected)
        if rel > worst:
            worst, note = rel, said or note
    outcome = Outcome.PASS if pairs and worst <= FLOAT32_STEP else Outcome.FAIL
    reporter.add(Result(case, outcome, worst, tolerance=f"each rel {FLOAT32_STEP:g}", note=note))


def furthest(found: Sequence[float], expected: Sequence[float]) -> tuple[float, str]:
    """The largest relative error of one level, and what to say of it; infinite where their numbers differ."""
    if len(found) != len(expected):
        return math.inf, f"{len(found)} noise levels instead of {len(expected)}"
    errors = [
        abs(one - other) / abs(other) if other else (0.0 if one == 0 else math.inf)
        for one, other in zip(found, expected, strict=True)
    ]
    return max(errors, default=0.0), ""


def recorded_schedule(spec: Sequence[object], sampler: str) -> list[float]:
    """The noise levels of a header's `[table, shift, schedule, steps]` for a sampler, as a KSampler has them."""
    _, _, schedule, steps = spec
    return table_sigmas_for(str(schedule), int(str(steps)), named_levels(spec), sampler)


def named_levels(spec: Sequence[object]) -> NoiseLevels:
    """The table of `[table, shift, …]`.

    Raises:
        ValueError: no such table.
    """
    if spec[0] == "aura":
        return NoiseLevels.aura(float(str(spec[1])))
    if spec[0] == "flux":
        return NoiseLevels.flux(flux_mu(spec[1]))
    raise ValueError(f"no table of noise levels is known for {spec[0]!r}")


def flux_mu(shift: object) -> float:
    """Flux's shift from a number, or from `WIDTHxHEIGHT`."""
    width, times, height = str(shift).partition("x")
    return shift_mu(image_tokens(int(width), int(height))) if times else float(width)
