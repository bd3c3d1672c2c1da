"""Plays many devices through the server's own backlog and queue, on an event loop whose clock jumps to whatever
happens next. Only devices are made up; the same seed gives the same figures, on every machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import LOOK_AHEAD, MAX_OVERTAKEN, JobQueue, ScheduledJob
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import SetKey
from chromarpc_server.runtime.running_time import RunningTime

JOB_S = 5.2
"""1024×1024, 25 steps, `reference` on an H100."""
SWITCH_S = 0.14
"""To another adapter set whose files are parsed."""
PARSE_S = 0.1
"""More where one is not: rank 16 from a page cache; from a disk it takes longer."""
MODEL = "card"


@dataclass(frozen=True)
class Arrival:
    """A job of a trace."""

    at_s: float
    caller: str
    adapter: int
    profile: str = "reference"


@dataclass(frozen=True)
class Load:
    """What a trace is drawn from."""

    devices: int
    load: float
    """Work that arrives to work that can be done."""
    jobs: int
    callers: int = 50
    adapters: int = 500
    zipf: float = 1.1
    flood: bool = False
    """Whether one caller more brings a third of the work, a minute of all devices at a time."""
    fp8: float = 0.0
    """The share of jobs that only half of the devices can compute."""
    seed: int = 1


@dataclass(frozen=True)
class Policy:
    """How the next job and the device are chosen."""

    name: str = "as it is"
    max_overtaken: int = MAX_OVERTAKEN
    look_ahead: int = LOOK_AHEAD
    prefer_resident: bool = True
    prefer_parsed: bool = True
    prefer_least_used: bool = True


@dataclass(frozen=True)
class Played:
    """What became of a trace. Seconds waited, from arrival to the start."""

    policy: str
    devices: int
    load: float
    flood: bool
    fp8: float
    jobs: int
    runs: int
    """As many, where each ran once."""
    p50_s: float
    p99_s: float
    max_s: float
    light_p99_s: float
    """Of callers that do not flood."""
    light_max_s: float
    fairness: float
    """Jain's index of the mean waits, plus one job's time, of callers that do not flood: 1 where all are equal."""
    resident: float
    """The share of jobs whose weights were resident on their device."""
    switch_s: float
    """Spent on a job on average, to make weights resident."""
    overtaken: float
    """The share of jobs that others overtook."""
    most_overtaken: int
    use_spread: float
    """The most used device's time less the least used one's, to the mean."""


def trace(load: Load) -> list[Arrival]:
    """Jobs in the order in which they arrive."""
    chance = random.Random(load.seed)  # noqa: S311 - nothing is secret here
    weights = list(accumulate(1 / rank**load.zipf for rank in range(1, load.adapters + 1)))
    rate = load.load * load.devices / JOB_S

    def job(at_s: float, caller: str) -> Arrival:
        (adapter,) = chance.choices(range(load.adapters), cum_weights=weights)
        return Arrival(at_s, caller, adapter, "fp8" if chance.random() < load.fp8 else "reference")

    arrivals, now = [], 0.0
    steady = load.jobs * 2 // 3 if load.flood else load.jobs
    steady_rate = rate * steady / load.jobs
    for _ in range(steady):
        now += chance.expovariate(steady_rate)
        arrivals.append(job(now, f"caller-{chance.randrange(load.callers)}"))
    batch = round(60 * load.devices / JOB_S)
    floods = round((load.jobs - steady) / batch)
    for index in range(floods):
        begins = now * (index + 0.5) / floods
        arrivals += [job(begins, "flood") for _ in range(batch)]
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def read_trace(path: Path) -> list[Arrival]:
    """One that was recorded."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted((Arrival(**json.loads(line)) for line in lines), key=lambda arrival: arrival.at_s)


class _Jump(selectors.SelectSelector):
    """Does not wait, but moves the clock on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is left to happen")
        self.now += max(0.0, timeout)
        return []


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while anything is to be done, and jumps to the next timer then."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


class Card:
    """A device: `Taker` to the backlog, and seconds to the simulation."""

    model = MODEL

    def __init__(self, policy: Policy, host: OrderedDict[AdapterFile, None], profiles: Sequence[str]) -> None:
        self.used_s = 0.0
        self.spent_s = 0.0
        self._policy = policy
        self._profiles = profiles
        self._resident: OrderedDict[SetKey, None] = OrderedDict()
        self._host = host
        """Adapters that are parsed there, the one used last at the end."""

    def can_compute(self, job: Job) -> bool:
        return job.plan.profile in self._profiles

    def is_resident(self, key: SetKey) -> bool:
        return self._policy.prefer_resident and key in self._resident

    def has_parsed(self, job: Job) -> bool:
        return self._policy.prefer_parsed and all(file in self._host for file in job.adapter_files)

    def prepare(self, job: Job, sets: int, parsed: int) -> float:
        """Seconds until the job's weights are resident, of which the device then has no more than `sets`."""
        took = 0.0
        if job.set_key not in self._resident:
            took += SWITCH_S
            took += sum(PARSE_S for file in job.adapter_files if file not in self._host)
        _used(self._resident, job.set_key, sets)
        for file in job.adapter_files:
            _used(self._host, file, parsed)
        return took

    def spend(self, seconds: float) -> None:
        self.spent_s += seconds
        if self._policy.prefer_least_used:
            self.used_s += seconds


def _used(order: OrderedDict[Any, None], key: object, most: int) -> None:
    order[key] = None
    order.move_to_end(key)
    if len(order) > most:
        order.popitem(last=False)


@dataclass
class _Run:
    arrival: Arrival
    job: Job
    begun_s: list[float]
    resident: bool = False
    switch_s: float = 0.0


def play(arrivals: Sequence[Arrival], load: Load, policy: Policy, *, sets: int = 2, parsed: int = 128) -> Played:
    """Replays a trace.

    Args:
        arrivals: the trace.
        load: what it was drawn from; says how many devices there are.
        policy: how to choose.
        sets: prepared weights that a device has room for.
        parsed: adapters that the host of eight devices has room for.
    """
    loop = VirtualTime()
    try:
        runs, cards = loop.run_until_complete(_play(arrivals, load, policy, sets, parsed))
    finally:
        loop.close()
    waits = [begun - run.arrival.at_s for run in runs for begun in run.begun_s]
    light = [run for run in runs if run.arrival.caller != "flood"]
    light_waits = [run.begun_s[0] - run.arrival.at_s for run in light]
    by_caller: dict[str, list[float]] = {}
    for run, wait in zip(light, light_waits, strict=True):
        by_caller.setdefault(run.arrival.caller, []).append(wait)
    means = [sum(found) / len(found) + JOB_S for found in by_caller.values()]
    spent = [card.spent_s for card in cards]
    return Played(
        policy.name,
        load.devices,
        load.load,
        load.flood,
        load.fp8,
        jobs=len(arrivals),
        runs=len(waits),
        p50_s=_percentile(waits, 0.5),
        p99_s=_percentile(waits, 0.99),
        max_s=max(waits),
        light_p99_s=_percentile(light_waits, 0.99),
        light_max_s=max(light_waits),
        fairness=sum(means) ** 2 / (len(means) * sum(mean**2 for mean in means)),
        resident=sum(run.resident for run in runs) / len(runs),
        switch_s=sum(run.switch_s for run in runs) / len(runs),
        overtaken=sum(run.job.overtaken > 0 for run in runs) / len(runs),
        most_overtaken=max(run.job.overtaken for run in runs),
        use_spread=(max(spent) - min(spent)) / (sum(spent) / len(spent)),
    )


async def _play(
    arrivals: Sequence[Arrival], load: Load, policy: Policy, sets: int, parsed: int
) -> tuple[list[_Run], list[Card]]:
    loop = asyncio.get_running_loop()
    backlog = _backlog(policy)
    hosts: list[OrderedDict[AdapterFile, None]] = [OrderedDict() for _ in range(-(-load.devices // 8))]
    cards = [
        Card(policy, hosts[index // 8], ("reference", "fp8") if index % 2 or not load.fp8 else ("reference",))
        for index in range(load.devices)
    ]
    runs: dict[str, _Run] = {}
    left = len(arrivals)
    done = asyncio.Event()

    async def serve(card: Card) -> None:
        nonlocal left
        while True:
            scheduled = await backlog.next(card)
            run = runs[scheduled.job.id]
            run.begun_s.append(loop.time())
            run.switch_s = card.prepare(scheduled.job, sets, parsed)
            run.resident = not run.switch_s
            took = run.switch_s + JOB_S
            await asyncio.sleep(took)
            card.spend(took)
            backlog.ran(card)
            left -= 1
            if not left:
                done.set()

    for card in cards:
        backlog.join(card)
    serving = [asyncio.create_task(serve(card)) for card in cards]
    plans = _Plans()
    for arrival in arrivals:
        if arrival.at_s > loop.time():
            await asyncio.sleep(arrival.at_s - loop.time())
        scheduled = plans.scheduled(arrival)
        runs[scheduled.job.id] = _Run(arrival, scheduled.job, [])
        backlog.schedule(scheduled)
    await done.wait()
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    return list(runs.values()), cards


def _backlog(policy: Policy) -> Backlog:
    none: Any = None  # nothing is fetched, stored or ended here
    queue = JobQueue(policy.max_overtaken, policy.look_ahead)
    backlog = Backlog(none, none, none, StepTimes(), RunningTime(), max_jobs=0, queue=queue)
    backlog.open()
    return backlog


class _Plans:
    """Jobs of arrivals; what is alike is made once."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, str], tuple[Plan, AdapterFile]] = {}

    def scheduled(self, arrival: Arrival) -> ScheduledJob:
        key = (arrival.adapter, arrival.profile)
        if key not in self._plans:
            self._plans[key] = self._made(arrival)
        plan, file = self._plans[key]
        none = Path()
        job = Job(plan, (file,), Cancellation(), owner=arrival.caller)
        return ScheduledJob(job, CheckpointFiles(none, none, none, none), FoundAdapters((file,)))

    def _made(self, arrival: Arrival) -> tuple[Plan, AdapterFile]:
        name = f"{arrival.adapter}.safetensors"
        plan = Plan(
            model=MODEL,
            served_model=MODEL,
            profile=arrival.profile,
            noise_draw=NoiseDraw.FLOAT32,
            prompts=(PlannedPrompt("", 1024, 1024, 25, 4.0, 1),),
            loras=(PlannedLora(name, 1.0),),
            output=PlannedOutput(ImageFormat.PNG, 95),
            preview=None,
            warnings=(),
        )
        return plan, AdapterFile(Path(name), 1, 0, arrival.adapter, 0, Path())


def _percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
