"""Lists what the tests do not run: files below a share, with the lines that are missing.

`make coverage` runs the tests with coverage.py and then this. docs/testing.md names the files that are expected
here and says why; a file that is listed and not named there makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testing.md"
SHARE_PERCENT = 90.0


@dataclass(frozen=True)
class Covered:
    """What the tests ran of one file."""

    file: str
    """Below the repository's root."""
    lines: int
    """That could run."""
    missing: tuple[int, ...]
    """Those of them that did not."""

    @property
    def percent(self) -> float:
        """The share that ran."""
        return 100.0 * (1 - len(self.missing) / self.lines) if self.lines else 100.0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.uncovered", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--share", type=float, default=SHARE_PERCENT, help="list files below it (percent; %(default)s)"
    )
    share = parser.parse_args(arguments).share
    files = sorted(measured(), key=lambda one: one.percent)
    named = PAGE.read_text(encoding="utf-8")
    below = [one for one in files if one.percent < share]
    unnamed = [one for one in below if not is_named(one.file, named)]
    for one in below:
        note = "" if one not in unnamed else f" (not named in {PAGE.relative_to(ROOT).as_posix()})"
        print(f"{one.percent:5.1f} %  {one.file}{note}\n         {ranges(one.missing)}")
    lines, missing = sum(one.lines for one in files), sum(len(one.missing) for one in files)
    percent = 100 * (1 - missing / max(1, lines))
    print(f"{percent:.1f} % of {lines} lines in {len(files)} files; {len(below)} files below {share:g} %")
    return 1 if unnamed else 0


def measured() -> list[Covered]:
    """What coverage.py measured, combined over processes."""
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "-"]
    report = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    return parsed(json.loads(report))


def parsed(report: Mapping[str, Mapping[str, Mapping[str, list[int]]]]) -> list[Covered]:
    """The files of a report of `coverage json`."""
    files = report["files"].items()
    return [
        Covered(
            name.replace("\\", "/"),
            len(found["executed_lines"]) + len(found["missing_lines"]),
            tuple(found["missing_lines"]),
        )
        for name, found in files
    ]


def is_named(file: str, page: str) -> bool:
    """Whether the page names a file, by its path within its package."""
    return f"`{file.partition('/')[2]}`" in page


def ranges(lines: Iterable[int]) -> str:
    """`[3, 4, 5, 9]` → `3-5, 9`."""
    found: list[list[int]] = []
    for line in sorted(lines):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
