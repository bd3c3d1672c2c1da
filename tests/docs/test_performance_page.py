"""docs/performance.md and its plot are what the committed results give."""

from __future__ import annotations

from typing import Any

import pytest

from bench import mismatch, report, report_preview, results_file


def test_the_committed_page_is_what_the_results_give() -> None:
    assert report.PAGE.read_text() == report.page(), "run `make performance`"


def test_the_committed_plot_is_what_the_results_give() -> None:
    assert report.PLOT.read_text() == report.plot(), "run `make performance`"


def test_the_page_of_mismatches_holds_what_was_measured() -> None:
    page = (results_file.ROOT / "docs" / "preview-mismatch.md").read_text()
    table = mismatch.mismatch_table(results_file.load("cpu-mismatch"))
    assert table in page, "take what `make bench-mismatch` prints"


def test_a_target_is_judged_by_its_value() -> None:
    assert results_file.judge(1.0, 1.0) == "met"
    assert results_file.judge(1.1, 1.0, 1.2) == "within the limit"
    assert results_file.judge(1.3, 1.0, 1.2) == "**missed**"


def figure(profile: str, rank: int, seconds: float) -> dict[str, Any]:
    """One of bench.speed."""
    return {
        "profile": profile,
        "rank": rank,
        "width": 1024,
        "height": 1024,
        "runs": 1,
        "total_s": seconds,
        "best_s": seconds,
        "worst_s": seconds,
        "step_s": seconds / 25,
    }


def test_the_trainers_recorded_time_stands_beside_the_adapter_it_was_recorded_with_alone() -> None:
    figures = [figure("reference", 0, 5.0), figure("preview", 0, 5.2), figure("preview", 16, 5.5)]
    result = {"figures": [*figures, figure("preview", 128, 5.8), figure("fp8", 0, 3.6)]}
    _, _, *lines = report_preview.preview_speed_table(result).splitlines()
    assert lines == [
        "| `reference` | none | 1024×1024 | 5.000 | one run | 200.0 | × 1.000 |  |  |  |",
        "| `preview` | none | 1024×1024 | 5.200 | one run | 208.0 | × 1.040 |  |  | × 1.02: **missed** |",
        "| `preview` | 16 | 1024×1024 | 5.500 | one run | 220.0 | × 1.100 | 22.35 | × 4.06 | 5.6: met |",
        "| `preview` | 128 | 1024×1024 | 5.800 | one run | 232.0 | × 1.160 |  |  | 5.75: **missed** |",
    ]
    assert report_preview.trainer_verdict(result) == "`preview` is 4.06 times as fast at 1024×1024."


@pytest.mark.parametrize(
    ("place", "rank", "adapter", "multiplier"),
    [
        ("beside", 16, "150: met", "20: **missed**"),
        ("beside", 128, "300: met", "20: **missed**"),
        ("merged", 16, "600: met", "600: met"),
    ],
)
def test_a_switch_is_judged_by_where_the_adapter_goes(
    place: str, rank: int, adapter: str, multiplier: str
) -> None:
    switch = {
        "profile": "preview",
        "adapter": "lora",
        "place": place,
        "quantize": place == "beside",
        "master": "pinned host",
        "rank": rank,
        "first_s": None,
        "switch_s": 0.14,
        "scale_s": 0.03,
        "graphs_recorded": 0,
        "equal_bits": True,
    }
    *_, line = report_preview.preview_switching_table({"figures": [switch]}).splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[6:12] == ["140", adapter, "30", multiplier, "0", "yes"]


def test_what_was_not_measured_is_said_to_be() -> None:
    assert results_file.measured("h100-of-no-bench", results_file.origin) == "not measured yet"
