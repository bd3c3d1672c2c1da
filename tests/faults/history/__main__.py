"""The command line: `python -m tests.faults.history --seconds 60 --seed 7`."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.faults.history import planted
from tests.faults.history.choices import DEFAULT_FAULTS, FAULTS
from tests.faults.history.judge import judge
from tests.faults.history.run import Plan, plan_of_plant, run


def main() -> None:
    """Runs, and prints the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.history", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="of every choice; a new one if unset")
    parser.add_argument("--faults", help=f"all, none, or some of {','.join(FAULTS)}")
    parser.add_argument("--devices", default="", help="of the server, such as cpu,cpu; one CPU if unset")
    parser.add_argument("--plant", choices=planted.PLANTS, help="break this on purpose, and end once it is found")
    parser.add_argument("--json", type=Path, help="also write the report there")
    parser.add_argument("--folder", type=Path, help="leave data, history and the server's log in this new folder")
    parser.add_argument(
        "--judge", type=Path, metavar="FILE", help="run nothing: judge the history that an earlier run left"
    )
    options = parser.parse_args()
    if options.judge is not None:
        problems = judge(pickle.loads(options.judge.read_bytes()))  # noqa: S301 - a file of our own
        print("\n".join(map(str, problems)) or "nothing found")
        raise SystemExit(1 if problems else 0)
    if options.plant is None:
        seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
        plan = Plan(
            seed,
            options.seconds,
            _kinds(parser, options.faults or ",".join(DEFAULT_FAULTS)),
            devices=options.devices,
        )
    else:
        plan = plan_of_plant(options.plant, options.seconds, seed=options.seed)
    print(f"seed {plan.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "run"
        folder.mkdir(parents=True)
        report = run(plan, folder)
    text = json.dumps(asdict(report), indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)
    raise SystemExit(1 if report.problems else 0)


def _kinds(parser: argparse.ArgumentParser, names: str) -> tuple[str, ...]:
    kinds = {"all": tuple(FAULTS), "none": ()}.get(names, tuple(names.split(",")))
    if unknown := set(kinds) - set(FAULTS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    return kinds


if __name__ == "__main__":
    main()
