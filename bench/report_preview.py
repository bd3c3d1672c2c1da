"""Tables of docs/performance.md that tell of the trainer's picture: `preview` and `preview-exact`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.report_speed import SWITCH_TARGETS
from bench.results_file import Json, figure, judge, size, spread, table
from bench.speed import PREVIEW_RATIO, PREVIEW_TARGETS, TRAINER_RANK, TRAINER_SECONDS
from chromarpc_server.domain.trainer import PREVIEW_PROFILES

ADAPTER_MS, MULTIPLIER_MS = {16: 150, 128: 300}, 20
"""Milliseconds at most until another adapter beside the weights takes effect, by rank, and another multiplier."""


def _ours(rows: Iterable[Json]) -> list[Json]:
    return [row for row in rows if row["profile"] in PREVIEW_PROFILES]


def _rank(row: Json) -> str:
    return str(row["rank"]) if row["rank"] else "none"


def _trainer_seconds(f: Json) -> float | None:
    """What the trainer took for the same; None where it was not recorded."""
    return TRAINER_SECONDS.get((f["width"], f["height"])) if f["rank"] == TRAINER_RANK else None


def _speed_target(f: Json, base: Json) -> str:
    """The target of a figure and whether it is met; empty where there is none."""
    if f["profile"] != "preview":
        return ""
    if not f["rank"]:
        limit = PREVIEW_RATIO * base["total_s"]
        return f"× {PREVIEW_RATIO:.2f}: {judge(f['total_s'], limit)}"
    target = PREVIEW_TARGETS.get((f["rank"], f["width"], f["height"]))
    return "" if target is None else f"{target}: {judge(f['total_s'], target)}"


def preview_speed_table(result: Json) -> str:
    """Text to pixels, beside `reference` in the same process and the trainer's recorded time."""
    rows = []
    for f in [f for f in result["figures"] if f["profile"] in (*PREVIEW_PROFILES, "reference")]:
        base = figure(result, "reference", f["width"], f["height"])
        trainer = _trainer_seconds(f)
        rows.append(
            [
                f"`{f['profile']}`",
                _rank(f),
                size(f),
                f"{f['total_s']:.3f}",
                spread(f),
                f"{1000 * f['step_s']:.1f}",
                f"× {f['total_s'] / base['total_s']:.3f}",
                "" if trainer is None else f"{trainer:.2f}",
                "" if trainer is None else f"× {trainer / f['total_s']:.2f}",
                _speed_target(f, base),
            ]
        )
    header = ("profile", "rank", "size", "seconds", "spread", "ms a step", "to `reference`")
    return table([*header, "the trainer's seconds", "faster than the trainer", "target"], rows)


def trainer_verdict(result: Json) -> str:
    """How much faster than the trainer itself each form is with the adapter that was recorded with it."""
    told = []
    for profile in ("preview", "preview-exact"):
        ratios = [
            (size(f), trainer / f["total_s"])
            for f in result["figures"]
            if f["profile"] == profile and (trainer := _trainer_seconds(f)) is not None
        ]
        if ratios:
            told.append(f"`{profile}` is " + " and ".join(f"{r:.2f} times as fast at {at}" for at, r in ratios))
    return "; ".join(told) + "."


def _costs(result: Json) -> list[dict[str, Any]]:
    return list(result["path_costs"])


def path_costs_table(result: Json) -> str:
    """What an adapter beside the weights costs a picture."""
    rows = [
        [
            f"`{c['profile']}`",
            str(c["rank"]),
            str(c["modules"]),
            f"{c['width']}×{c['height']}",
            f"{c['seconds']:+.3f}",
            f"{c['percent']:+.1f} %",
        ]
        for c in _costs(result)
    ]
    return table(("profile", "rank", "modules", "size", "seconds a picture", "of the time without"), rows)


def path_costs_verdict(result: Json) -> str:
    """The same for `preview`, in a sentence."""
    told = [
        f"{c['seconds']:.2f} s ({c['percent']:.1f} %) with rank {c['rank']} at {c['width']}×{c['height']}"
        for c in _costs(result)
        if c["profile"] == "preview"
    ]
    return f"Its low-rank path costs `preview` {', '.join(told)}."


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.0f}"


def _switch_targets(f: Json) -> tuple[str, str]:
    """Of another adapter and of another multiplier, each with whether it is met; empty where there are none."""
    if f["profile"] != "preview":
        return "", ""
    if f["place"] == "beside":
        limits = ADAPTER_MS.get(f["rank"]), MULTIPLIER_MS
    else:
        limits = (round(1000 * SWITCH_TARGETS[f["master"]]),) * 2
    found = 1000 * f["switch_s"], 1000 * f["scale_s"]
    adapter, multiplier = (
        "" if limit is None else f"{limit}: {judge(value, limit)}"
        for value, limit in zip(found, limits, strict=True)
    )
    return adapter, multiplier


def preview_switching_table(result: Json) -> str:
    """Another adapter and another multiplier, beside the weights and merged."""
    rows = []
    for f in _ours(result["figures"]):
        adapter_target, multiplier_target = _switch_targets(f)
        kind = {"lora": "LoRA", "dora": "DoRA"}[f["adapter"]]
        rows.append(
            [
                f"`{f['profile']}`",
                kind if f["quantize"] else f"{kind}, `quantize: false`",
                f["place"],
                f["master"],
                str(f["rank"]),
                _milliseconds(f["first_s"]),
                _milliseconds(f["switch_s"]),
                adapter_target,
                _milliseconds(f["scale_s"]),
                multiplier_target,
                "" if f["graphs_recorded"] is None else str(f["graphs_recorded"]),
                {True: "yes", False: "**no**", None: ""}[f["equal_bits"]],
            ]
        )
    header = ("profile", "adapter", "goes", "master on", "rank", "first ms", "another adapter ms", "target")
    return table([*header, "another multiplier ms", "target", "graphs recorded anew", "bits equal"], rows)


def preview_error_table(result: Json) -> str:
    """Distance from the truth of the trainer's function."""
    rows = []
    for e in _ours(result["errors"]):
        ratios = [f"× {e[key]:.3f}" if e[key] is not None else "" for key in ("velocity_ratio", "latents_ratio")]
        errors = [f"{100 * e[key]:.2f} %" for key in ("first_velocity", "latents")]
        rows.append([f"`{e['profile']}`", _rank(e), *errors, *ratios])
    steps = f"after {result['steps']} steps"
    header = ("profile", "rank", "one forward", steps, "to `preview-exact`, one forward")
    return table([*header, f"to `preview-exact`, {steps}"], rows)
