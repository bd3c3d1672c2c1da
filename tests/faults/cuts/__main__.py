"""Cuts everywhere, with more chance than the tests have time for.

python -m tests.faults.cuts --variants 10 --starts 40
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.faults.cuts import recorder
from tests.faults.cuts.explore import PLAYS, Explorer, Report


def run(seed: int, variants: int, starts: int) -> Report:
    """Explores every play."""
    with folder_in_memory() as folder:
        explorer = Explorer(folder, seed)
        try:
            for play in PLAYS:
                explorer.cut(explorer.record(play), variants=variants, starts=starts)
        finally:
            explorer.close()
    return explorer.report


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder that is gone in the end: fsync costs nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder).resolve()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=5, help="power cuts by chance, for each point and rule")
    parser.add_argument("--starts", type=int, default=20, help="points whose start is cut everywhere too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the report there")
    options = parser.parse_args()
    if why_not := recorder.why_not():
        parser.exit(2, f"nothing can be recorded here: {why_not}\n")
    report = run(options.seed, options.variants, options.starts)
    text = json.dumps(asdict(report), indent=2)
    print(text)
    print(report.line)
    if options.json is not None:
        options.json.write_text(text + "\n")
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
