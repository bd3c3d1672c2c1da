"""A run: a server, nine clients, faults beside them, and in the end a look at everything that was told."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chromarpc_server.transport.access.callers_file import entry_text
from tests.faults.history.calls import Calls
from tests.faults.history.choices import (
    CLIENTS,
    DEFAULT_FAULTS,
    NEEDS_TMPFS,
    OWNERS,
    intents,
    planned_faults,
)
from tests.faults.history.clients import RandomClient
from tests.faults.history.clock import LIBRARIES, WallClock
from tests.faults.history.disk import RESERVE_BYTES, disk
from tests.faults.history.disturbances import Disturbances
from tests.faults.history.index import FULLS, Index
from tests.faults.history.judge import judge, operations
from tests.faults.history.memory import Memory
from tests.faults.history.planted import MODULE, PLANTS, VARIABLE
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import MAKING, Asked, History, Recorder
from tests.faults.history.server_life import ServerLife
from tests.tiny_checkpoint import write_tiny_checkpoint

JOB_ATTEMPTS = 3
LOOK_EVERY_S = 1.0
"""How often a run that ends at a problem is judged."""
SERVER = "chromarpc_server"
HISTORY = "history.pickle"
"""Everything that was told, for judging it again; as safe to read as its writer."""


@dataclass(frozen=True)
class Plan:
    """What a run is to be."""

    seed: int
    seconds: float
    faults: Sequence[str] = DEFAULT_FAULTS
    module: str = SERVER
    """What is run as the server."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the server, beside this process's."""
    devices: str = ""
    """Flag of the server; one CPU where it is empty."""
    ends_at: str = ""
    """A rule: the run is over once it is found to be broken."""


def plan_of_plant(name: str, seconds: float, *, seed: int | None = None) -> Plan:
    """A run that ends once it has found a fault that was planted; `seed`: another one than the plant's own."""
    plant = PLANTS[name]
    return Plan(
        plant.seed if seed is None else seed,
        seconds,
        plant.faults,
        module=MODULE,
        environment={VARIABLE: name},
        ends_at=plant.rule,
    )


@dataclass
class Report:
    """What came of it."""

    seed: int
    seconds: float
    accepted: int = 0
    """Jobs that were told."""
    ended: dict[str, int] = field(default_factory=dict)
    """By state, as it was told last; those that were deleted before are missing."""
    calls: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Kinds of faults that this machine cannot have, and why."""
    disk_filled_by: str = ""
    restarts: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rules(self) -> set[str]:
        """Those that were broken."""
        return {problem["rule"] for problem in self.problems}


def run(plan: Plan, folder: Path) -> Report:
    """Does everything below a folder, which is left for looking at, but for a disk that was mounted."""
    recorder, memory = Recorder(), Memory()
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    tokens = {owner: f"chromarpc_{owner}" for owner in OWNERS}
    callers = folder / "callers.toml"
    callers.write_text("".join(entry_text(owner, token) for owner, token in tokens.items()))
    flags = ["--callers", str(callers), "--job-attempts", str(JOB_ATTEMPTS), "--reattach-s", "2"]
    # The last look asks for every job that there ever was, as fast as it can.
    flags += ["--limits.max-calls-per-minute-per-caller", "1000000"]
    flags += ["--limits.max-calls-per-minute-per-peer", "1000000"]
    flags += ["--disk-reserve", str(RESERVE_BYTES)]
    flags += ["--devices", plan.devices] if plan.devices else []
    skipped: dict[str, str] = {}
    clock = None
    if "clock" in plan.faults and LIBRARIES:
        clock = WallClock(folder / "clock")
    elif "clock" in plan.faults:
        skipped["clock"] = "libfaketime is not installed: apt-get install faketime"
    environment = {**plan.environment, **(clock.environment() if clock else {})}
    with disk(folder / "disk") as data_disk:
        data_dir = data_disk.folder / "data"
        life = ServerLife(checkpoint, data_dir, flags, module=plan.module, environment=environment)
        try:
            life.start()
            if not life.await_ready():
                life.close()
                raise AssertionError(f"the server did not start: {''.join(life.logs)}")

            def calls(client: str) -> Calls:
                token = tokens[client.rpartition("-")[0]]
                return Calls(client, token, life.target, recorder, memory)

            disturbances = Disturbances(life, data_disk, clock)
            kinds = [kind for kind in plan.faults if kind not in skipped]
            if "full" in kinds and not data_disk.holds_through_starts:
                skipped |= dict.fromkeys(sorted(NEEDS_TMPFS), "this user may mount no tmpfs")
            with _clients(plan, calls, memory):
                found = _disturb(plan, kinds, disturbances, recorder, skipped)
            if not found:
                _settle(disturbances, recorder, memory, calls)
        finally:
            life.close()
    (folder / "server.log").write_text("\n".join(life.logs))
    history = recorder.history(max_attempts=JOB_ATTEMPTS, is_settled=not found)
    (folder / HISTORY).write_bytes(pickle.dumps(history))
    counted = report(plan, history, judge(history), starts=life.starts)
    filled_by = data_disk.how if FULLS & counted.faults.keys() else ""
    return replace(counted, skipped=skipped, disk_filled_by=filled_by)


@contextmanager
def _clients(plan: Plan, calls: Any, memory: Memory) -> Iterator[None]:
    """All of them, until the end of the block."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(CLIENTS), thread_name_prefix="client") as threads:
        running = [
            threads.submit(RandomClient(calls(client), intents(plan.seed, client), memory, stop).run)
            for client in CLIENTS
        ]
        try:
            yield
        finally:
            stop.set()
    for client in running:
        client.result()


def _disturb(
    plan: Plan,
    kinds: Sequence[str],
    disturbances: Disturbances,
    recorder: Recorder,
    skipped: Container[str],
) -> bool:
    """Lets faults happen for as long as the run is to last. Returns whether it ended before, at a problem."""
    end_s = time.monotonic() + plan.seconds
    for planned in planned_faults(plan.seed, kinds):
        if planned.kind in skipped:
            continue
        if _pass(plan, min(end_s, time.monotonic() + planned.after_s), recorder):
            return True
        if time.monotonic() >= end_s:
            return False
        fault = disturbances.happen(planned)
        recorder.fault(fault)
        if not fault.is_ready:
            return True
    return _pass(plan, end_s, recorder)


def _pass(plan: Plan, until_s: float, recorder: Recorder) -> bool:
    """Lets time pass. Returns whether the problem was found that ends the run."""
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(min(left_s, LOOK_EVERY_S))
        if plan.ends_at:
            problems = judge(recorder.history(max_attempts=JOB_ATTEMPTS))
            if any(problem.rule == plan.ends_at for problem in problems):
                return True
    return False


def _settle(disturbances: Disturbances, recorder: Recorder, memory: Memory, calls: Any) -> None:
    """Looks at every job until it ends, stops the server in good order, and looks at all again."""
    with ThreadPoolExecutor(len(CLIENTS), thread_name_prefix="settle") as threads:

        def each(look: Any) -> None:
            for done in [
                threads.submit(look, calls(client), jobs, lists) for client, jobs, lists in _parts(memory)
            ]:
                done.result()

        each(_look_closely)
        recorder.fault(disturbances.stop_in_good_order())
        each(_look_again)


def _parts(memory: Memory) -> Iterator[tuple[str, list[str], bool]]:
    """For each client its share of its owner's jobs, and whether it is to list them."""
    for client in CLIENTS:
        owner, _, number = client.rpartition("-")
        shares = len(CLIENTS) // len(OWNERS)
        jobs = [job.job_id for job in memory.all_of(owner)]
        yield client, jobs[int(number) :: shares], number == "0"


def _look_closely(calls: Calls, jobs: list[str], lists: bool) -> None:
    for job_id in jobs:
        calls.watch(Asked(job_id=job_id))
        calls.get(job_id)
        calls.get_image(Asked(job_id=job_id))
    _look_again(calls, [], lists)


def _look_again(calls: Calls, jobs: list[str], lists: bool) -> None:
    for job_id in jobs:
        calls.get(job_id)
    if lists:
        calls.list_pages(1000, 1000)
        calls.list_loras()
    calls.close()


def report(plan: Plan, history: History, problems: Sequence[Problem], *, starts: int) -> Report:
    """Everything counted."""
    made, ended = set(), {}
    for call in history.calls:
        if call.method in MAKING and call.job_id:
            made.add(call.job_id)
        if call.end_state:
            ended[call.job_id] = call.end_state
        ended |= {view.job_id: view.state for view in call.views if view.is_ended}
    outcomes = Counter(
        "cut" if call.outcome.is_cut else call.outcome.reason or call.outcome.status for call in history.calls
    )
    counted = Counter(problem.count_as for problem in problems)
    index = Index(history)
    return Report(
        seed=plan.seed,
        seconds=plan.seconds,
        accepted=len(made),
        ended=dict(sorted(Counter(ended.values()).items())),
        calls=dict(sorted(Counter(call.method for call in history.calls).items())),
        outcomes=dict(outcomes.most_common()),
        faults=dict(sorted(Counter(fault.kind for fault in history.faults).items())),
        restarts=starts - 1,
        lost=counted["lost"],
        doubled=counted["doubled"],
        wrong=counted["wrong"],
        problems=[{**asdict(problem), "operations": operations(index, problem)} for problem in problems],
    )
