"""Random kills, three rounds; `python -m tests.ray.kill_nine` makes a hundred."""

from __future__ import annotations

from pathlib import Path

from tests.ray.kill_nine import run


def test_nothing_is_lost_or_doubled_whichever_part_is_killed(tmp_path: Path) -> None:
    report = run(3, 0, tmp_path)
    assert report.problems == []
    assert report.kills == {"server": 1, "actor": 1, "host": 1}
    assert report.accepted > 0
    assert (report.lost, report.duplicated) == (0, 0)
