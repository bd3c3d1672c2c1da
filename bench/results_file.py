"""The JSON files in bench/results, and how their numbers are written on a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

Json = dict[str, Any]


def load(name: str) -> Json:
    """One result; FileNotFoundError says which is missing."""
    result: Json = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def measured(name: str, part: Callable[[Json], str]) -> str:
    """A part of the page made from one result, or that there is none yet."""
    try:
        result = load(name)
    except FileNotFoundError:
        return "not measured yet"
    return part(result)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(result: Json) -> str:
    """Machine, versions and commit of a result."""
    device = result["device"] if isinstance(result["device"], str) else result["device"]["name"]
    versions = result.get("versions", {})
    torch = versions.get("torch", result.get("torch"))
    return f"{device}, torch {torch}, commit {result['commit']}"


def figure(result: Json, profile: str, width: int, height: int) -> Json:
    """Of a result of bench.speed."""
    wanted = (profile, width, height)
    found: Json = next(f for f in result["figures"] if (f["profile"], f["width"], f["height"]) == wanted)
    return found


def size(item: Json) -> str:
    """Of a picture."""
    return f"{item['width']}×{item['height']}"


def judge(value: float, target: float, limit: float | None = None) -> str:
    """Whether a target is met."""
    if value <= target:
        return "met"
    return "within the limit" if limit is not None and value <= limit else "**missed**"


def spread(f: Json) -> str:
    """Seconds of the best and the worst run."""
    return f"{f['best_s']:.3f}–{f['worst_s']:.3f}" if f["runs"] > 1 else "one run"
