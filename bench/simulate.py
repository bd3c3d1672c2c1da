"""Waits on many devices, without any: `python -m bench.simulate [--devices 8 64 512] [--out FILE.json]`.

Compares policies of the queue, on the server's own code (see `bench.simulation`). A steady trace is a Poisson
stream of jobs of many callers with Zipf-distributed adapters; in the other scenario one caller more hands in a
whole minute's work of all devices at once, again and again. `--trace FILE` replays a recorded one instead: a JSON
object a line with `at_s`, `caller`, `adapter` and `profile`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.machine import commit
from bench.simulation import JOB_S, PARSE_S, SWITCH_S, Arrival, Load, Played, Policy, play, read_trace, trace

AS_IT_IS = Policy()
POLICIES = (
    AS_IT_IS,
    *(replace(AS_IT_IS, name=f"overtaken {count}", max_overtaken=count) for count in (0, 1, 2, 8, 16)),
    *(replace(AS_IT_IS, name=f"look ahead {count}", look_ahead=count) for count in (16, 64)),
    replace(AS_IT_IS, name="not where resident", prefer_resident=False, max_overtaken=0),
    replace(AS_IT_IS, name="not where parsed", prefer_parsed=False),
    replace(AS_IT_IS, name="not the least used", prefer_least_used=False),
    replace(
        AS_IT_IS,
        name="the first free one",
        prefer_resident=False,
        prefer_parsed=False,
        prefer_least_used=False,
        max_overtaken=0,
    ),
)
SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "steady": {"flood": False, "fp8": 0.0},
    "flood": {"flood": True, "fp8": 0.3},
}
"""Poisson arrivals on equal devices; with floods, and with jobs that half of the devices can compute."""
JOBS = 10_000
"""About so many are behind each figure, of as many seeds as that takes."""
JOBS_A_DEVICE = 250
"""No more in one trace: 20 minutes of work."""
_COLUMNS: Mapping[str, str] = {
    "p50_s": "p50 s",
    "p99_s": "p99 s",
    "max_s": "max s",
    "light_p99_s": "light p99",
    "light_max_s": "light max",
    "fairness": "Jain",
    "resident": "resident",
    "switch_s": "switch s",
    "overtaken": "overtaken",
    "most_overtaken": "most",
    "use_spread": "use",
}


_WORST = ("max_s", "light_max_s", "most_overtaken")


def _line(played: Played) -> str:
    shown = "".join(f"{getattr(played, name):>10.3f}" for name in _COLUMNS)
    return f"{played.policy:20}{shown}"


def mean(found: Sequence[Played]) -> Played:
    """Of the same policy and load with several seeds: means, or the worst of all for what is of the worst."""
    values: dict[str, Any] = {
        "jobs": sum(played.jobs for played in found),
        "runs": sum(played.runs for played in found),
    }
    for name in _COLUMNS:
        each = [getattr(played, name) for played in found]
        values[name] = max(each) if name in _WORST else sum(each) / len(each)
    return replace(found[0], **values)


def policy_table(result: Mapping[str, Any]) -> str:
    """For the page about scale: a line a policy, one table for each trace."""
    parts: list[str] = []
    trace_before = None
    for one in result["played"]:
        traced = (one["devices"], one["load"], one["flood"])
        if traced != trace_before:
            trace_before = traced
            kind = "one caller floods, 30 % of jobs for half of the devices" if one["flood"] else "Poisson"
            parts.append(f"\n{one['devices']} devices, load {one['load']}, {kind}:\n\n{_HEAD}")
        parts.append(
            f"| {one['policy']} | {one['p50_s']:.2f} | {one['p99_s']:.1f} | {one['max_s']:.1f} "
            f"| {one['light_p99_s']:.1f} | {one['fairness']:.3f} | {100 * one['resident']:.0f} % "
            f"| {one['switch_s']:.3f} | {100 * one['overtaken']:.0f} % |"
        )
    return "\n".join(parts).strip()


_HEAD = (
    "| policy | wait p50 s | p99 s | max s | p99 s of those who do not flood | Jain | resident | switch s a job "
    "| overtaken |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.85, 0.95])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--jobs", type=int, default=JOBS, help="about so many behind each figure")
    parser.add_argument("--sets", type=int, default=2, help="prepared weights that a device has room for")
    parser.add_argument("--policies", nargs="+", help="parts of the names of those to compare; all by default")
    parser.add_argument("--seed", type=int, default=1, help="of the first trace")
    parser.add_argument("--trace", type=Path, help="replay this one instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.policies
    policies = [one for one in POLICIES if wanted is None or any(word in one.name for word in wanted)]
    found: list[Played] = []
    for title, load, traces in _loads(arguments):
        print(f"\n{load.devices} devices, {title}, {sum(map(len, traces))} jobs")
        print(" " * 20 + "".join(f"{name:>10}" for name in _COLUMNS.values()), flush=True)
        for policy in policies:
            found.append(mean([play(arrivals, load, policy, sets=arguments.sets) for arrivals in traces]))
            print(_line(found[-1]), flush=True)
    if arguments.out:
        result = {
            "bench": "simulate",
            "commit": commit(),
            "seed": arguments.seed,
            "sets": arguments.sets,
            "job_s": JOB_S,
            "switch_s": SWITCH_S,
            "parse_s": PARSE_S,
            "callers": Load.callers,
            "adapters": Load.adapters,
            "zipf": Load.zipf,
            "played": [asdict(one) for one in found],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _loads(arguments: argparse.Namespace) -> Iterator[tuple[str, Load, list[list[Arrival]]]]:
    """What is to be played, each with its traces."""
    for devices in arguments.devices:
        if arguments.trace is not None:
            yield str(arguments.trace), Load(devices, 0.0, 0), [read_trace(arguments.trace)]
            continue
        jobs = min(JOBS_A_DEVICE * devices, arguments.jobs)
        seeds = range(arguments.seed, arguments.seed + max(1, arguments.jobs // jobs))
        for name in arguments.scenarios:
            for rate in arguments.loads:
                load = Load(devices, rate, jobs, **SCENARIOS[name])
                yield f"{name}, load {rate}", load, [trace(replace(load, seed=seed)) for seed in seeds]


if __name__ == "__main__":
    main()
