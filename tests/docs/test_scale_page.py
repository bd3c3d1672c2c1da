"""docs/scale.md holds what was simulated, and the constants that were chosen from it."""

from __future__ import annotations

import pytest

from bench import scale, simulate
from bench.results_file import ROOT, load
from chromarpc_server.jobs.queue import LOOK_AHEAD, MAX_OVERTAKEN

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["simulate", "simulate-512", "simulate-half-load"])
def test_the_page_holds_what_was_simulated(name: str) -> None:
    assert simulate.policy_table(load(name)) in PAGE, "put in what simulate.policy_table makes of the result"


@pytest.mark.parametrize("name", ["cpu-scale-33", "cpu-scale-206"])
def test_the_page_holds_what_the_front_was_measured_to_cost(name: str) -> None:
    assert scale.scale_table(load(name)) in PAGE, "put in what scale.scale_table makes of the result"


def test_the_page_tells_the_constants_that_are_in_force() -> None:
    assert f"Among the first {LOOK_AHEAD} jobs" in PAGE
    assert f"overtaken more than {MAX_OVERTAKEN} times" in PAGE
