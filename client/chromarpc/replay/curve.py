"""The curve of similarity over steps, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 34, 34
TOP_DB: Final = 60.0
"""What is closer is drawn here; equal pixels above."""


def curve_svg(samples: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], min_psnr_db: float) -> str:
    """Each drawn sample as a point, and the median of each step as a line."""
    if not steps:
        return '<p class="soft">Nothing was drawn, so there is no curve.</p>'
    drawn = [sample for sample in samples if sample["psnr_db"] is not None]
    lowest: float = min([min_psnr_db, *(sample["psnr_db"] for sample in drawn)])
    floor = max(0, math.floor((lowest - 3) / 10) * 10)
    last: int = max(step["step"] for step in steps) or 1

    def x(step: int) -> float:
        return round(LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * step / last, 1)

    def y(psnr_db: float, *, same: bool = False) -> float:
        if same:
            return TOP / 2 + 2
        share = (min(psnr_db, TOP_DB) - floor) / (TOP_DB - floor)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP - 6) * share, 1)

    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Similarity to the trainer\'s pictures over the steps of the training">',
        f'<rect class="band" x="{LEFT}" y="6" width="{WIDTH - LEFT - RIGHT}" height="{TOP - 8}" rx="4"/>',
        f'<text class="band-text" x="{LEFT - 6}" y="{TOP / 2 + 6}" text-anchor="end">same</text>',
    ]
    for value in range(floor, int(TOP_DB) + 1, 10):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value} dB</text>')
    parts += [
        f'<text x="{x(step)}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>'
        for step in _some([step["step"] for step in steps])
    ]
    if floor <= min_psnr_db <= TOP_DB:
        at = y(min_psnr_db)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="limit-text" x="{WIDTH - RIGHT - 4}" y="{at - 5}" text-anchor="end">'
            f"limit {min_psnr_db:g} dB</text>"
        )
    medians = [(x(s["step"]), y(s["median_psnr_db"], same=s["median_psnr_db"] >= 100)) for s in steps]
    if len(medians) > 1:
        parts.append(f'<polyline class="median" points="{" ".join(f"{a},{b}" for a, b in medians)}"/>')
    for sample in drawn:
        same, below = sample["same_pixels"], sample["below_min_psnr"]
        kind = "identical" if same else "below" if below else ""
        told = "identical" if sample["identical"] else "same pixels" if same else f"{sample['psnr_db']:.1f} dB"
        title = escape(f"step {sample['step']}, sample {sample['index']}: {told}")
        at_x, at_y = x(sample["step"]), y(sample["psnr_db"], same=same)
        parts.append(f'<circle class="{kind}" cx="{at_x}" cy="{at_y}" r="4.5"><title>{title}</title></circle>')
    parts.append("</svg>")
    return "".join(parts)


def _some(steps: Sequence[int], most: int = 9) -> list[int]:
    """So few of the steps that their labels do not touch, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return sorted({steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)})
