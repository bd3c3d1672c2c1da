"""The history checker finds what was planted, each time by the rule that it breaks, and nothing elsewhere."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.faults.history.choices import CLIENTS, FAULTS, intents, planned_faults
from tests.faults.history.planted import PLANTS
from tests.faults.history.run import Plan, plan_of_plant, run

CLEAN_SEED, CLEAN_S = 63, 12


@pytest.mark.planted
@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_found_by_its_rule(name: str, tmp_path: Path) -> None:
    plan = plan_of_plant(name, 60)
    print(f"{name}: seed {plan.seed}")
    report = run(plan, tmp_path)
    assert PLANTS[name].rule in report.rules, report


def test_a_short_history_has_no_problem(tmp_path: Path) -> None:
    report = run(Plan(CLEAN_SEED, CLEAN_S), tmp_path)
    assert report.problems == []
    assert report.accepted > 0
    assert report.faults


def test_a_seed_decides_what_is_asked_and_what_happens() -> None:
    for client in CLIENTS:
        first, again, other = (list(islice(intents(seed, client), 200)) for seed in (7, 7, 8))
        assert first == again != other
    faults, same = (list(islice(planned_faults(7, tuple(FAULTS)), 100)) for _ in range(2))
    assert faults == same
    assert {planned.kind for planned in faults} == {kind for kinds in FAULTS.values() for kind in kinds}
    assert list(planned_faults(7, ())) == []
