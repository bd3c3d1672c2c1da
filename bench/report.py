"""Writes docs/performance.md and its plot from the JSON files in bench/results: `python -m bench.report`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.preview import TARGETS as PREVIEW_TARGETS
from bench.speed import TARGETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "performance.svg"
PROSE = ROOT / "bench" / "performance.md.in"
"""Hand-written text; `{{name}}` stands for a function of this module's `PARTS`."""
SHAPE_TOLERANCE = 0.05
SWITCH_TARGETS = {"device": 0.3, "pinned host": 0.6}
TIERS = {"12gb": ("12 GB", 11), "16gb": ("16 GB", 15), "24gb": ("24 GB", 20), "warm": ("80 GB", 48)}
"""Files of the service's bench; the card's memory; the most GB that may be used."""

Json = dict[str, Any]


def load(name: str) -> Json:
    """One result; FileNotFoundError says which is missing."""
    result: Json = json.loads((RESULTS / f"{name}.json").read_text())
    return result


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


def headline() -> str:
    """Load time, seconds a step and peak memory."""
    speed = load("h100-speed")
    told = []
    for profile in ("exact", "reference"):
        f = figure(speed, profile, 1024, 1024)
        told.append(f"`{profile}` {f['step_s']:.3f} s a step, {f['peak_gb']:.1f} GB at most")
    return (
        f"Full size, one H100, 1024×1024: {'; '.join(told)}; "
        f"a server serves {_starts('cached')[0]:.1f} to {_starts('cached')[-1]:.1f} s after its process began, "
        f"warm-up included ({_starts('compiled anew')[0]:.1f} s when all kernels are compiled anew)."
    )


def _target(speed: Json, f: Json) -> tuple[str, str]:
    key = (f["profile"], f["width"], f["height"])
    if key in TARGETS:
        target, limit = TARGETS[key]
        return f"{target} ({limit})", judge(f["total_s"], target, limit)
    if size(f) == "768×1344":
        square = figure(speed, f["profile"], 1024, 1024)
        predicted = square["total_s"] * f["teraflops"] / square["teraflops"]
        off = f["total_s"] / predicted - 1
        return (
            f"{predicted:.2f} ± 5 %",
            f"{'met' if abs(off) <= SHAPE_TOLERANCE else '**missed**'} ({100 * off:+.1f} %)",
        )
    return "", ""


def _speed_rows(speed: Json, exact: Json | None) -> Iterable[list[str]]:
    for f in speed["figures"]:
        ratio = ""
        if exact is not None:
            ratio = f"× {figure(exact, 'exact', f['width'], f['height'])['total_s'] / f['total_s']:.2f}"
        target, outcome = _target(speed, f)
        spread = f"{f['best_s']:.3f}–{f['worst_s']:.3f}" if f["runs"] > 1 else "one run"
        yield [
            f"`{f['profile']}`",
            size(f),
            f"{f['total_s']:.3f}",
            spread,
            f"{1000 * f['step_s']:.1f}",
            f"{f['peak_gb']:.1f}",
            f"× {f['total_s'] / f['floor_s']:.2f}",
            *([ratio] if exact is not None else []),
            target,
            outcome,
        ]


SPEED_HEADER = ("profile", "size", "seconds", "spread", "ms a step", "GB reserved", "over the floor")


def speed_table() -> str:
    """Text to pixels on an H100."""
    speed = load("h100-speed")
    return table([*SPEED_HEADER, "faster than `exact`", "target (limit)", ""], _speed_rows(speed, speed))


def torch_attention_table() -> str:
    """The same without FlashAttention-3."""
    speed = load("h100-speed-torch-attention")
    return table([*SPEED_HEADER, "target (limit)", ""], _speed_rows(speed, None))


def rates() -> str:
    """Measured in the run of the main table."""
    speed = load("h100-speed")
    return f"{speed['matmul_tflops']:.0f} TF/s in bf16, {speed['float8_tflops']:.0f} TF/s in float8"


def _error_rows(result: Json) -> Iterable[list[str]]:
    for e in result["errors"]:
        ratios = [f"× {e[key]:.3f}" if e[key] is not None else "" for key in ("velocity_ratio", "latents_ratio")]
        yield [f"`{e['profile']}`", f"{100 * e['first_velocity']:.2f} %", f"{100 * e['latents']:.2f} %", *ratios]


def _error_table(name: str) -> str:
    header = ("profile", "one forward", "after 25 steps", "to `exact`, one forward", "to `exact`, after 25 steps")
    return table(header, _error_rows(load(name)))


def service_table() -> str:
    """Ten requests to a server on an H100."""
    return _service_table("h100-service")


def _service_table(name: str) -> str:
    rows = [
        [
            size(r),
            str(r["tokens"]),
            f"{r['client_s']:.3f}",
            f"{r['pipeline_s']:.3f}",
            f"{r['encoding_s']:.3f}",
            f"{r['overhead_ms']:.1f}",
            f"{r['first_step_s']:.3f}",
            f"{r['step_ms']:.1f}",
        ]
        for r in load(name)["requests"]
    ]
    header = ("size", "tokens", "client s", "pipeline s", "PNG s", "beyond both, ms", "first step s", "ms a step")
    return table(header, rows)


def _service_verdict(name: str) -> str:
    result = load(name)
    over = [r["overhead_ms"] for r in result["requests"]]
    within = sum(value <= 10 for value in over)
    cost = result["previews_cost"]
    return (
        f"Beyond pipeline and PNG: {min(over):.1f} to {max(over):.1f} ms an image, "
        f"{within} of {len(over)} within the target of 10 ms. "
        f"A preview at every step cost {100 * cost:.1f} % of the time "
        f"(target 1 %: {judge(cost, 0.01)}). "
        f"Files compiled after warm-up: {result['compiled_after_warm_up']}."
    )


def service_against_bench() -> str:
    """The first request of each size beside the bench's median."""
    speed, rows, seen = load("h100-speed"), [], set()
    for r in load("h100-service")["requests"]:
        if size(r) in seen:
            continue
        seen.add(size(r))
        alone = figure(speed, r["profile"], r["width"], r["height"])["total_s"]
        rows.append(
            [
                size(r),
                str(r["tokens"]),
                f"{alone:.3f}",
                f"{100 * (r['pipeline_s'] / alone - 1):+.1f} %",
                f"{100 * (r['client_s'] / alone - 1):+.1f} %",
            ]
        )
    return table(("size", "tokens", "bench s", "server's pipeline", "client, PNG included"), rows)


def _starts(kernels: str, *, to_first_step: bool = False) -> list[float]:
    """Seconds of the starts with these kernels, the shortest first."""
    return sorted(
        s["serving_after_s"] + (s["first_step_s"] if to_first_step else 0.0)
        for s in load("h100-start")["starts"]
        if s["kernels"] == kernels
    )


def start() -> str:
    """From the server's start to a first step."""
    result = load("h100-start")
    told = "; ".join(
        f"{' and '.join(f'{s:.1f}' for s in _starts(kernels, to_first_step=True))} s with kernels {kernels}"
        for kernels in ("cached", "compiled anew")
    )
    worst = _starts("cached", to_first_step=True)[-1]
    return (
        f"From the process's start to the first step ({origin(result)}): {told}. "
        f"Target 15 s, compile aside: {judge(worst, 15)}."
    )


def memory_table() -> str:
    """Servers limited to what smaller cards have."""
    rows = []
    for name, (card, target) in TIERS.items():
        result = load(f"h100-service-{name}")
        request, plan = result["requests"][0], result["memory_plan"]
        tiled = ", autoencoder in tiles" if plan.get("tile_autoencoder") else ""
        graphs = "" if plan.get("record_graphs") else ", no graphs"
        rows.append(
            [
                card,
                f"weights {plan['weights']}, T5 on {plan['text_encoder']}, "
                f"master on {plan['master']}{tiled}{graphs}",
                f"{request['peak_gb']:.1f}",
                f"{target}",
                judge(request["peak_gb"], target),
                f"{result['device_memory_gb']:.1f}",
                f"{request['pipeline_s']:.2f}",
                f"{request['pipeline_s'] / load('h100-service-warm')['requests'][0]['pipeline_s']:.2f}",
            ]
        )
    header = ("card", "plan", "GB by torch", "target", "", "GB by the driver", "pipeline s", "× of 80 GB")
    return table(header, rows)


def _switching_table(name: str, targets: bool) -> str:
    rows = []
    for f in load(name)["figures"]:
        target = SWITCH_TARGETS[f["master"]]
        rows.append(
            [
                f"`{f['profile']}`",
                f["master"],
                str(f["rank"]),
                f"{f['cold_s']:.3f}",
                f"{f['switch_s']:.3f}",
                f"{f['scale_s']:.3f}",
                f"{f['worst_s']:.3f}",
                *([f"{target}: {judge(f['switch_s'], target)}"] if targets else []),
                "yes" if f["equal_bits"] else "**no**",
            ]
        )
    names = ("profile", "master on", "rank", "cold build s", "switch s", "other multiplier s", "worst s")
    return table([*names, *(["target"] if targets else []), "bits equal"], rows)


def cpu_speed_table() -> str:
    """chroma-mini on two cores."""
    speed = load("cpu-speed")
    rows = []
    for f in speed["figures"]:
        exact = figure(speed, "exact", f["width"], f["height"])["total_s"]
        spread = f"{f['best_s']:.3f}–{f['worst_s']:.3f}" if f["runs"] > 1 else "one run"
        rows.append(
            [
                f"`{f['profile']}`",
                size(f),
                f"{f['total_s']:.3f}",
                spread,
                f"{1000 * f['step_s']:.1f}",
                f"× {f['total_s'] / f['floor_s']:.2f}",
                f"× {exact / f['total_s']:.2f}",
            ]
        )
    header = ("profile", "size", "seconds", "spread", "ms a step", "over the floor", "faster than `exact`")
    return table(header, rows)


def preview_table() -> str:
    """What the trainer's picture costs."""
    result = load("h100-preview")
    rows = []
    for f in result["figures"]:
        base = next(b for b in result["figures"] if b["profile"] == "reference" and b["side"] == f["side"])
        target = PREVIEW_TARGETS.get((f["rank"], f["side"])) if f["profile"] == "preview" else None
        rows.append(
            [
                f"`{f['profile']}`",
                str(f["rank"]) if f["rank"] else "none",
                f"{f['side']}×{f['side']}",
                f"{f['total_s']:.3f}",
                f"{f['best_s']:.3f}–{f['worst_s']:.3f}" if f["runs"] > 1 else "one run",
                f"× {f['total_s'] / base['total_s']:.3f}",
                "" if target is None else f"{target}: {judge(f['total_s'], target)}",
            ]
        )
    return table(("profile", "rank", "size", "seconds", "spread", "to `reference`", "target"), rows)


def preview_switches_table() -> str:
    """Other adapters and multipliers beside the weights."""
    rows = []
    for s in load("h100-preview")["switches"]:
        target = {16: 150, 128: 300}[s["rank"]]
        rows.append(
            [
                str(s["rank"]),
                f"{s['first_ms']:.0f}",
                f"{s['adapter_ms']:.0f}",
                f"{target}: {judge(s['adapter_ms'], target)}",
                f"{s['multiplier_ms']:.0f}",
                f"20: {judge(s['multiplier_ms'], 20)}",
                str(s["graphs_recorded"]),
            ]
        )
    header = ("rank", "first, making room, ms", "another adapter ms", "target", "another multiplier ms", "target")
    return table((*header, "graphs recorded anew"), rows)


def watchers_table(name: str) -> str:
    """Many watchers of one running job."""
    header = ["watchers", "events", "saw all, in order", "median ms", "99th percentile ms", "ms a step", "slower"]
    return table(
        [*header, "memory MB"],
        (
            [
                f"{w['watchers']:,}",
                f"{w['events']:,}",
                f"{w['complete']:,}",
                f"{w['p50_ms']:.0f}",
                f"{w['p99_ms']:.0f}",
                f"{w['step_ms']:.0f}",
                f"{100 * w['slowdown']:.0f} %",
                f"+{w['rss_growth_mb']:.0f}",
            ]
            for w in load(name)["watched"]
        ),
    )


def watchers_verdict(name: str) -> str:
    """The rest of that bench."""
    result = load(name)
    made, again = result["created"], sorted(result["reattach_ms"])
    return (
        f"An idle server takes {100 * result['idle_cpu']:.2f} % of a core (target 1 %). After a cut the first "
        f"missed event comes {again[len(again) // 2]:.0f} ms after the new call, at worst {again[-1]:.0f} ms "
        f"(target 50 ms). 20 `CreateJob` a second for {made['calls'] / 20:.0f} s: "
        f"{made['calls']} calls, {made['accepted']} accepted, "
        f"{made['refused_full']} `QUEUE_FULL`, {made['other']} with another answer; the server lists "
        f"{made['listed']} of them."
    )


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "rates": rates,
    "speed": speed_table,
    "speed origin": lambda: origin(load("h100-speed")),
    "torch attention": torch_attention_table,
    "torch attention origin": lambda: origin(load("h100-speed-torch-attention")),
    "error": lambda: _error_table("h100-error"),
    "error origin": lambda: origin(load("h100-error")),
    "service": service_table,
    "service origin": lambda: origin(load("h100-service")),
    "service verdict": lambda: _service_verdict("h100-service"),
    "service against bench": service_against_bench,
    "start": start,
    "memory": memory_table,
    "switching": lambda: _switching_table("h100-switching", targets=True),
    "switching origin": lambda: origin(load("h100-switching")),
    "preview": preview_table,
    "preview switches": preview_switches_table,
    "preview origin": lambda: origin(load("h100-preview")),
    "cpu speed": cpu_speed_table,
    "cpu origin": lambda: origin(load("cpu-speed")),
    "cpu service origin": lambda: f"commit {load('cpu-service')['commit']}",
    "memory origin": lambda: f"commit {load('h100-service-12gb')['commit']}",
    "cpu error": lambda: _error_table("cpu-error"),
    "cpu service": lambda: _service_table("cpu-service"),
    "cpu service verdict": lambda: _service_verdict("cpu-service"),
    "watchers": lambda: watchers_table("cpu-watchers"),
    "watchers verdict": lambda: watchers_verdict("cpu-watchers"),
    "h100 watchers": lambda: watchers_table("h100-watchers"),
    "h100 watchers verdict": lambda: watchers_verdict("h100-watchers"),
    "h100 watchers origin": lambda: f"commit {load('h100-watchers')['commit']}",
    "watchers origin": lambda: f"commit {load('cpu-watchers')['commit']}",
    "cpu switching": lambda: _switching_table("cpu-switching", targets=False),
}


def page() -> str:
    """docs/performance.md; KeyError for a part that there is not."""
    return re.sub(r"\{\{(.+?)\}\}", lambda match: PARTS[match[1]](), PROSE.read_text())


STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.exact{fill:#8c959f}
.reference{fill:#0969da}.fp8{fill:#8250df}
.floor{stroke:#cf222e;stroke-width:2}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.exact{fill:#6e7681}.reference{fill:#58a6ff}.fp8{fill:#bc8cff}
.floor{stroke:#ff7b72}}"""


def plot() -> str:
    """Bars of seconds from text to pixels, with a stroke at the floor."""
    figures = load("h100-speed")["figures"]
    sizes = list(dict.fromkeys(size(f) for f in figures))
    scale = 420 / max(f["total_s"] for f in figures)
    left, y, parts = 180, 44, []
    for shape in sizes:
        parts.append(f'<text x="10" y="{y + 14}" font-weight="bold">{shape}</text>')
        for f in (f for f in figures if size(f) == shape):
            width, floor = scale * f["total_s"], left + scale * f["floor_s"]
            parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{f["profile"]}</text>')
            parts.append(
                f'<rect class="{f["profile"]}" x="{left}" y="{y}" width="{width:.1f}" height="18" rx="2"/>'
            )
            parts.append(f'<line class="floor" x1="{floor:.1f}" y1="{y - 2}" x2="{floor:.1f}" y2="{y + 20}"/>')
            parts.append(f'<text x="{left + width + 8:.1f}" y="{y + 14}">{f["total_s"]:.2f} s</text>')
            y += 24
        y += 14
    title = "Seconds from text to pixels, one H100, 25 steps, guidance 4; red: the floor"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {y}" role="img" aria-label="{title}">',
            f"<style>{STYLE}</style>",
            f'<text x="10" y="22">{title}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Writes both."""
    PAGE.write_text(page())
    PLOT.write_text(plot())
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
