"""Tables of docs/performance.md that tell of the reference's function: speed, error, switching; and the plot."""

from __future__ import annotations

from collections.abc import Iterable

from bench.report_service import starts
from bench.results_file import Json, figure, judge, load, size, spread, table
from bench.speed import TARGETS
from chromarpc_server.domain.trainer import PREVIEW_PROFILES

SHAPE_TOLERANCE = 0.05
SWITCH_TARGETS = {"device": 0.3, "pinned host": 0.6}
"""Seconds at most of a switch that merges, by where the master lies."""


def of_the_reference(rows: Iterable[Json]) -> list[Json]:
    """Those of the profiles that compute the reference's function; the trainer's have tables of their own."""
    return [row for row in rows if row["profile"] not in PREVIEW_PROFILES]


def headline() -> str:
    """Load time, seconds a step and peak memory."""
    speed = load("h100-speed")
    told = []
    for profile in ("exact", "reference"):
        f = figure(speed, profile, 1024, 1024)
        told.append(f"`{profile}` {f['step_s']:.3f} s a step, {f['peak_gb']:.1f} GB at most")
    return (
        f"Full size, one H100, 1024×1024: {'; '.join(told)}; "
        f"a server serves {starts('cached')[0]:.1f} to {starts('cached')[-1]:.1f} s after its process began, "
        f"warm-up included ({starts('compiled anew')[0]:.1f} s when all kernels are compiled anew)."
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
    for f in of_the_reference(speed["figures"]):
        ratio = ""
        if exact is not None:
            ratio = f"× {figure(exact, 'exact', f['width'], f['height'])['total_s'] / f['total_s']:.2f}"
        target, outcome = _target(speed, f)
        yield [
            f"`{f['profile']}`",
            size(f),
            f"{f['total_s']:.3f}",
            spread(f),
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
    for e in of_the_reference(result["errors"]):
        ratios = [f"× {e[key]:.3f}" if e[key] is not None else "" for key in ("velocity_ratio", "latents_ratio")]
        yield [f"`{e['profile']}`", f"{100 * e['first_velocity']:.2f} %", f"{100 * e['latents']:.2f} %", *ratios]


def error_table(name: str) -> str:
    """Distance from the truth of the reference's function."""
    header = ("profile", "one forward", "after 25 steps", "to `exact`, one forward", "to `exact`, after 25 steps")
    return table(header, _error_rows(load(name)))


def switching_table(name: str, targets: bool) -> str:
    """Between two adapters, and between two multipliers of one."""
    rows = []
    for f in of_the_reference(load(name)["figures"]):
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
    for f in of_the_reference(speed["figures"]):
        exact = figure(speed, "exact", f["width"], f["height"])["total_s"]
        rows.append(
            [
                f"`{f['profile']}`",
                size(f),
                f"{f['total_s']:.3f}",
                spread(f),
                f"{1000 * f['step_s']:.1f}",
                f"× {f['total_s'] / f['floor_s']:.2f}",
                f"× {exact / f['total_s']:.2f}",
            ]
        )
    header = ("profile", "size", "seconds", "spread", "ms a step", "over the floor", "faster than `exact`")
    return table(header, rows)


STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.exact{fill:#8c959f}
.reference{fill:#0969da}.fp8{fill:#8250df}
.floor{stroke:#cf222e;stroke-width:2}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.exact{fill:#6e7681}.reference{fill:#58a6ff}.fp8{fill:#bc8cff}
.floor{stroke:#ff7b72}}"""


def plot() -> str:
    """Bars of seconds from text to pixels, with a stroke at the floor."""
    figures = of_the_reference(load("h100-speed")["figures"])
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
