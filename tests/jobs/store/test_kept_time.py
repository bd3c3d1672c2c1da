"""The store's own time: it goes on, follows the wall clock slowly where that is ahead, and never goes back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from chromarpc_server.jobs.store.kept_time import CATCH_UP, MAX_GAIN_S, KeptTime

HOUR_S = 3600.0
SWEEP_S = 30.0


@dataclass
class Clocks:
    """A host's two clocks."""

    wall: float = 1e9
    monotonic: float = 50.0

    def kept(self, kept_s: float | None = None) -> KeptTime:
        return KeptTime(kept_s, wall=lambda: self.wall, monotonic=lambda: self.monotonic)

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_it_is_the_wall_clocks_while_nothing_happens_to_that() -> None:
    clocks = Clocks()
    kept = clocks.kept()
    for _ in range(10):
        clocks.pass_s(SWEEP_S)
        kept.advance()
        assert kept.now_s() == pytest.approx(clocks.wall)
    assert (kept.steps, kept.ahead_s) == (0, pytest.approx(0))


def test_a_step_forward_is_followed_slowly_and_told_once() -> None:
    clocks = Clocks()
    kept = clocks.kept()
    clocks.wall += 25 * HOUR_S
    assert kept.now_s() == pytest.approx(1e9)
    clocks.pass_s(SWEEP_S)
    kept.advance()
    assert kept.now_s() == pytest.approx(1e9 + SWEEP_S + CATCH_UP * SWEEP_S)
    assert (kept.steps, kept.ahead_s > 24 * HOUR_S) == (1, True)
    for _ in range(2 * 150):  # two and a half hours
        clocks.pass_s(SWEEP_S)
        kept.advance()
    assert kept.now_s() == pytest.approx(clocks.wall)
    assert kept.steps == 1


def test_one_look_gains_little_however_long_ago_the_last_one_was() -> None:
    clocks = Clocks()
    kept = clocks.kept()
    clocks.wall += 25 * HOUR_S
    clocks.pass_s(HOUR_S)  # the process was stopped
    kept.advance()
    assert kept.now_s() == pytest.approx(1e9 + HOUR_S + MAX_GAIN_S)


def test_a_step_back_stops_nothing() -> None:
    clocks = Clocks()
    kept = clocks.kept()
    clocks.wall -= 49 * HOUR_S
    clocks.pass_s(SWEEP_S)
    kept.advance()
    assert kept.now_s() == pytest.approx(1e9 + SWEEP_S)
    assert (kept.steps, kept.ahead_s) == (1, pytest.approx(-49 * HOUR_S))


@pytest.mark.parametrize("away_s", [-49 * HOUR_S, 0.0, 25 * HOUR_S, 90 * 24 * HOUR_S])
def test_a_new_process_goes_on_where_the_last_one_was(away_s: float) -> None:
    clocks = Clocks(wall=1e9 + away_s)
    kept = clocks.kept(1e9)
    assert kept.now_s() == pytest.approx(1e9)
    clocks.pass_s(SWEEP_S)
    kept.advance()
    assert 1e9 + SWEEP_S <= kept.now_s() + 1e-3 <= 1e9 + SWEEP_S * (1 + CATCH_UP) + 1
