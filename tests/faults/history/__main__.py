"""The command line: `python -m tests.faults.history --seconds 60 --seed 7`."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.faults.history.choices import DEFAULT_FAULTS, FAULTS
from tests.faults.history.run import Plan, run


def main() -> None:
    """Runs, and prints the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.history", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="of every choice; a new one if unset")
    kinds = f"all, none, or some of {', '.join(FAULTS)}"
    parser.add_argument("--faults", default=",".join(DEFAULT_FAULTS), help=kinds)
    parser.add_argument("--json", type=Path, help="also write the report there")
    parser.add_argument("--folder", type=Path, help="leave the data and the server's log there")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    faults = {"all": tuple(FAULTS), "none": ()}.get(options.faults, tuple(options.faults.split(",")))
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(Plan(seed, options.seconds, faults), folder)
    text = json.dumps(asdict(report), indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
