"""Which job is next: callers take turns, each caller's jobs go in the order they came, on however many devices.

A job whose weights are resident on the device that is free may go before others, but no job is overtaken so more
than a few times. Those whose caller is away for the moment let all others go first. One that the free device
cannot compute holds nobody up, and keeps its turn for a device that can.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Protocol

from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.jobs.job import Job
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.model_cache import SetKey

MAX_OVERTAKEN = 4
"""How many jobs may run before one whose turn it is because their weights are resident."""

LOOK_AHEAD = 8
"""Among how many jobs one is looked for whose weights are resident. Both numbers: docs/scale.md."""


class Taker(Protocol):
    """A device as the queue sees it."""

    @property
    def model(self) -> str:
        """The model of the GPU or CPU, by which step times are kept."""
        ...

    @property
    def used_s(self) -> float:
        """Seconds that it has spent on jobs so far."""
        ...

    def can_compute(self, job: Job) -> bool:
        """Whether it can compute the job; the same for all jobs of a model and profile that may run anywhere."""
        ...

    def is_resident(self, key: SetKey) -> bool:
        """Whether it has these prepared weights."""
        ...

    def has_parsed(self, job: Job) -> bool:
        """Whether all the job's adapters are parsed on its host."""
        ...


@dataclass(eq=False)
class ScheduledJob:
    """A job that waits or runs, with what its run needs."""

    job: Job
    model_files: CheckpointFiles
    adapters: FoundAdapters
    fetching: asyncio.Task[None] | None = None
    """Its downloads; it joins the queue once they are done."""
    kept_turn: int | None = None
    """An earlier turn than its caller has now: its turn came, and it did not run."""


@dataclass
class _Lane:
    """The jobs of one caller."""

    turn: int
    """The lower, the sooner."""
    jobs: deque[ScheduledJob] = field(default_factory=deque)

    def turn_of(self, scheduled: ScheduledJob) -> int:
        return self.turn if scheduled.kept_turn is None else scheduled.kept_turn

    def first_turn(self) -> int:
        return self.turn_of(self.jobs[0])


class JobQueue:
    """Lives on the event loop; bounded by whoever adds to it."""

    def __init__(self, max_overtaken: int = MAX_OVERTAKEN, look_ahead: int = LOOK_AHEAD) -> None:
        """See `MAX_OVERTAKEN` and `LOOK_AHEAD`."""
        self._max_overtaken = max_overtaken
        self._look_ahead = look_ahead
        self._lanes: dict[str, _Lane] = {}
        """By caller; nobody in it is without a job."""
        self._turns = count(1)
        self._count = 0

    def __len__(self) -> int:
        """May be asked from any thread."""
        return self._count

    def __iter__(self) -> Iterator[ScheduledJob]:
        """In the order in which they will run, as far as is known."""
        return self._in_turn(lambda _: True)

    def position(self, scheduled: ScheduledJob) -> int:
        """The place of one that is in the queue, from 1; looks at callers, not at all that wait."""
        own = self._lanes[scheduled.job.owner]
        before = own.jobs.index(scheduled)
        found, is_ahead = 1, True
        for lane in sorted(self._lanes.values(), key=_Lane.first_turn):
            if lane is own:
                is_ahead = False
            found += min(before + 1 if is_ahead else before, len(lane.jobs))
        return found

    def add(self, scheduled: ScheduledJob) -> None:
        """Puts a job behind its caller's others."""
        self._lane(scheduled).jobs.append(scheduled)
        self._count += 1

    def put_back(self, scheduled: ScheduledJob) -> None:
        """Puts a job that was taken before its caller's others, and first of all: it has had its turn."""
        scheduled.kept_turn = 0
        self._lane(scheduled).jobs.appendleft(scheduled)
        self._count += 1

    def remove(self, scheduled: ScheduledJob) -> None:
        """Takes one out.

        Raises:
            ValueError: it is not in the queue.
        """
        owner = scheduled.job.owner
        lane = self._lanes.get(owner, _Lane(0))
        lane.jobs.remove(scheduled)
        self._count -= 1
        if not lane.jobs:
            del self._lanes[owner]

    def take(self, taker: Taker) -> ScheduledJob | None:
        """Takes out the one that a free device is to run now: the first whose weights are resident there, unless
        that overtakes one that was overtaken too often. One whose caller is away keeps its place and waits for it,
        unless no other does. Gives None where the device can compute none.
        """
        chosen = self._choose(taker, lambda scheduled: scheduled.job.absence is None)
        chosen = chosen or self._choose(taker, lambda _: True)
        if chosen is not None:
            self._use_turn(taker, chosen)
            self.remove(chosen)
            chosen.kept_turn = None
        return chosen

    def _choose(self, taker: Taker, may_go: Callable[[ScheduledJob], bool]) -> ScheduledJob | None:
        passed: list[ScheduledJob] = []
        order = filter(may_go, self._in_turn(taker.can_compute))
        for scheduled in islice(order, self._look_ahead):
            if taker.is_resident(scheduled.job.set_key):
                for other in passed:
                    other.job.overtaken += 1
                return scheduled
            passed.append(scheduled)
            if scheduled.job.overtaken >= self._max_overtaken:
                break
        return passed[0] if passed else None

    def _use_turn(self, taker: Taker, taken: ScheduledJob) -> None:
        """The caller has had its turn with all jobs but those before this one that the device cannot compute:
        they keep theirs, or a caller's own later jobs would put them off for ever.
        """
        lane = self._lanes[taken.job.owner]
        is_before = True
        for scheduled in lane.jobs:
            if scheduled is taken:
                is_before = False
            elif taker.can_compute(scheduled.job):
                scheduled.kept_turn = None
            elif is_before:
                scheduled.kept_turn = lane.turn_of(scheduled)
        lane.turn = next(self._turns)

    def _in_turn(self, may_run: Callable[[Job], bool]) -> Iterator[ScheduledJob]:
        """Jobs that may run: one of each caller, then the next one of each, and so on."""
        callers: list[tuple[int, Iterator[ScheduledJob]]] = []
        for lane in self._lanes.values():
            own = (scheduled for scheduled in lane.jobs if may_run(scheduled.job))
            first = next(own, None)
            if first is not None:
                callers.append((lane.turn_of(first), chain((first,), own)))
        callers.sort(key=lambda caller: caller[0])
        waiting = [jobs for _, jobs in callers]
        while waiting:
            others: list[Iterator[ScheduledJob]] = []
            for jobs in waiting:
                scheduled = next(jobs, None)
                if scheduled is not None:
                    yield scheduled
                    others.append(jobs)
            waiting = others

    def _lane(self, scheduled: ScheduledJob) -> _Lane:
        owner = scheduled.job.owner
        if owner not in self._lanes:
            self._lanes[owner] = _Lane(next(self._turns))
        return self._lanes[owner]
