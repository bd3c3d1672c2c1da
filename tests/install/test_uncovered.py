"""The list of what the tests do not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import uncovered
from tools.uncovered import Covered

HALF = Covered("server/chromarpc_server/a.py", 8, (2, 3, 4, 9))
WHOLE = Covered("client/chromarpc/b.py", 8, ())


def test_a_report_becomes_files_with_their_missing_lines() -> None:
    report = {"files": {HALF.file: {"executed_lines": [1, 5, 6, 7], "missing_lines": [2, 3, 4, 9]}}}
    assert uncovered.parsed(report) == [HALF]
    assert HALF.percent == 50.0


def test_a_file_without_lines_is_covered() -> None:
    assert Covered("client/chromarpc/__init__.py", 0, ()).percent == 100.0


def test_lines_beside_each_other_become_one_range() -> None:
    assert uncovered.ranges([9, 2, 3, 4]) == "2-4, 9"


def test_what_the_page_does_not_name_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "testing.md"
    page.write_text("nothing")
    monkeypatch.setattr(uncovered, "ROOT", tmp_path)
    monkeypatch.setattr(uncovered, "PAGE", page)
    monkeypatch.setattr(uncovered, "measured", lambda: [HALF, WHOLE])
    assert uncovered.main([]) == 1
    told = capsys.readouterr().out
    assert f" 50.0 %  {HALF.file} (not named in testing.md)" in told
    assert "2-4, 9" in told
    assert WHOLE.file not in told
    assert "75.0 % of 16 lines in 2 files; 1 files below 90 %" in told
    page.write_text("`chromarpc_server/a.py`: why")
    assert uncovered.main([]) == 0
    assert uncovered.main(["--share", "50"]) == 0
