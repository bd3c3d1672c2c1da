"""docs/performance.md and its plot are what the committed results give."""

from __future__ import annotations

from bench import report


def test_the_committed_page_is_what_the_results_give() -> None:
    assert report.PAGE.read_text() == report.page(), "run `make performance`"


def test_the_committed_plot_is_what_the_results_give() -> None:
    assert report.PLOT.read_text() == report.plot(), "run `make performance`"


def test_a_target_is_judged_by_its_value() -> None:
    assert report.judge(1.0, 1.0) == "met"
    assert report.judge(1.1, 1.0, 1.2) == "within the limit"
    assert report.judge(1.3, 1.0, 1.2) == "**missed**"
