"""The queue on many devices that are only played: who runs, and who is not forgotten; no times of any machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import simulate
from bench.simulation import JOB_S, PARSE_S, SWITCH_S, Load, Policy, play, read_trace, trace
from chromarpc_server.jobs.queue import MAX_OVERTAKEN

FLOOD = Load(devices=16, load=0.9, jobs=600, callers=10, adapters=60, flood=True, fp8=0.3, seed=7)


def test_every_job_runs_once_and_none_is_overtaken_more_often_than_is_allowed() -> None:
    played = play(trace(FLOOD), FLOOD, Policy())
    assert played.runs == played.jobs > 500
    assert 0 < played.most_overtaken <= MAX_OVERTAKEN
    assert 0 < played.resident < 1


def test_a_caller_that_floods_waits_by_itself() -> None:
    played = play(trace(FLOOD), FLOOD, Policy())
    assert played.max_s > 3 * played.light_max_s
    assert played.fairness > 0.95


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    load = replace(FLOOD, jobs=200)
    assert play(trace(load), load, Policy()) == play(trace(load), load, Policy())
    assert trace(load) != trace(replace(load, seed=8))


def test_a_recorded_trace_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [
        {"at_s": 1.0, "caller": "b", "adapter": 2, "profile": "reference"},
        {"at_s": 0.0, "caller": "a", "adapter": 1},
        {"at_s": 0.5, "caller": "a", "adapter": 1},
    ]
    file, out = tmp_path / "trace.jsonl", tmp_path / "played.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [arrival.at_s for arrival in read_trace(file)] == [0.0, 0.5, 1.0]
    options = ["--trace", str(file), "--devices", "1", "--policies", "as it", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench.simulate", *options])
    simulate.main()
    (played,) = json.loads(out.read_text())["played"]
    # The second job of the adapter that is resident goes first in any case; the third switches.
    switched = JOB_S + SWITCH_S + PARSE_S
    assert played["runs"] == 3
    assert played["resident"] == pytest.approx(1 / 3)
    assert played["max_s"] == pytest.approx(switched + JOB_S - 1.0)
    assert "1 devices" in capsys.readouterr().out
