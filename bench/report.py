"""Writes docs/performance.md and its plot from the JSON files in bench/results: `python -m bench.report`."""

from __future__ import annotations

import re
from collections.abc import Callable

from bench.report_cards import cards_table, copies_table, predicted_table
from bench.report_preview import (
    path_costs_table,
    path_costs_verdict,
    preview_error_table,
    preview_speed_table,
    preview_switching_table,
    trainer_verdict,
)
from bench.report_service import (
    memory_table,
    service_against_bench,
    service_table,
    service_verdict,
    start,
    watchers_table,
    watchers_verdict,
)
from bench.report_speed import (
    cpu_speed_table,
    error_table,
    headline,
    plot,
    rates,
    speed_table,
    switching_table,
    torch_attention_table,
)
from bench.results_file import ROOT, load, measured, origin

PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "performance.svg"
PROSE = ROOT / "bench" / "performance.md.in"
"""Hand-written text; `{{name}}` stands for a function of this module's `PARTS`."""

PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "rates": rates,
    "speed": speed_table,
    "speed origin": lambda: origin(load("h100-speed")),
    "torch attention": torch_attention_table,
    "torch attention origin": lambda: origin(load("h100-speed-torch-attention")),
    "error": lambda: error_table("h100-error"),
    "error origin": lambda: origin(load("h100-error")),
    "service": lambda: service_table("h100-service"),
    "service origin": lambda: origin(load("h100-service")),
    "service verdict": lambda: service_verdict("h100-service"),
    "service against bench": service_against_bench,
    "start": start,
    "memory": memory_table,
    "small cards": lambda: measured("h100-small-cards", cards_table),
    "small cards origin": lambda: measured("h100-small-cards", origin),
    "small cards copies": lambda: measured("h100-small-cards", copies_table),
    "small cards predicted": lambda: measured("h100-small-cards", predicted_table),
    "switching": lambda: switching_table("h100-switching", targets=True),
    "switching origin": lambda: origin(load("h100-switching")),
    "preview runs": lambda: str(max(f["runs"] for f in load("h100-speed-preview")["figures"])),
    "preview speed": lambda: preview_speed_table(load("h100-speed-preview")),
    "preview speed origin": lambda: origin(load("h100-speed-preview")),
    "trainer verdict": lambda: trainer_verdict(load("h100-speed-preview")),
    "path costs": lambda: path_costs_table(load("h100-speed-preview")),
    "path costs verdict": lambda: path_costs_verdict(load("h100-speed-preview")),
    "preview switching": lambda: preview_switching_table(load("h100-switching-preview")),
    "preview switching origin": lambda: origin(load("h100-switching-preview")),
    "preview error": lambda: measured("h100-error-preview", preview_error_table),
    "preview error origin": lambda: measured("h100-error-preview", origin),
    "cpu speed": cpu_speed_table,
    "cpu origin": lambda: origin(load("cpu-speed")),
    "cpu service origin": lambda: f"commit {load('cpu-service')['commit']}",
    "memory origin": lambda: f"commit {load('h100-service-12gb')['commit']}",
    "cpu error": lambda: error_table("cpu-error"),
    "cpu service": lambda: service_table("cpu-service"),
    "cpu service verdict": lambda: service_verdict("cpu-service"),
    "watchers": lambda: watchers_table("cpu-watchers"),
    "watchers verdict": lambda: watchers_verdict("cpu-watchers"),
    "h100 watchers": lambda: watchers_table("h100-watchers"),
    "h100 watchers verdict": lambda: watchers_verdict("h100-watchers"),
    "h100 watchers origin": lambda: f"commit {load('h100-watchers')['commit']}",
    "watchers origin": lambda: f"commit {load('cpu-watchers')['commit']}",
    "cpu switching": lambda: switching_table("cpu-switching", targets=False),
}


def page() -> str:
    """docs/performance.md; KeyError for a part that there is not."""
    return re.sub(r"\{\{(.+?)\}\}", lambda match: PARTS[match[1]](), PROSE.read_text())


def main() -> None:
    """Writes both."""
    PAGE.write_text(page())
    PLOT.write_text(plot())
    print(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
