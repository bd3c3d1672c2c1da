"""Which job is next: callers take turns, each caller's jobs go in the order they came.

A job whose weights are resident may go before others, but no job is overtaken so more than a few times. Those
whose caller is away for the moment let all others go first.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.jobs.job import Job
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.model_cache import SetKey

MAX_OVERTAKEN = 4
"""How many jobs may run before one whose turn it is because their weights are resident."""


@dataclass(eq=False)
class ScheduledJob:
    """A job that waits or runs, with what its run needs."""

    job: Job
    model_files: CheckpointFiles
    adapters: FoundAdapters
    fetching: asyncio.Task[None] | None = None
    """Its downloads; it joins the queue once they are done."""


class JobQueue:
    """Lives on the event loop; bounded by whoever adds to it."""

    def __init__(self) -> None:
        self._by_owner: OrderedDict[str, deque[ScheduledJob]] = OrderedDict()
        """Whose turn it is first; nobody in it is without a job."""
        self._count = 0

    def __len__(self) -> int:
        """May be asked from any thread."""
        return self._count

    def __iter__(self) -> Iterator[ScheduledJob]:
        """In the order in which they will run, as far as is known."""
        for turn in zip_longest(*self._by_owner.values()):
            yield from (scheduled for scheduled in turn if scheduled is not None)

    def add(self, scheduled: ScheduledJob) -> None:
        """Puts a job behind its caller's others."""
        self._by_owner.setdefault(scheduled.job.owner, deque()).append(scheduled)
        self._count += 1

    def remove(self, scheduled: ScheduledJob) -> None:
        """Takes one out.

        Raises:
            ValueError: it is not in the queue.
        """
        owner = scheduled.job.owner
        jobs = self._by_owner.get(owner, deque())
        jobs.remove(scheduled)
        self._count -= 1
        if not jobs:
            del self._by_owner[owner]

    def take(self, is_resident: Callable[[SetKey], bool]) -> ScheduledJob:
        """Takes out the one to run now: the first whose weights are resident, unless that overtakes one that
        was overtaken too often. One whose caller is away keeps its place and waits for it, unless no other does.

        Raises:
            LookupError: the queue is empty.
        """
        order = [scheduled for scheduled in self if scheduled.job.absence is None] or list(self)
        if not order:
            raise LookupError("no job waits")
        chosen = 0
        for index, scheduled in enumerate(order):
            if is_resident(scheduled.job.set_key):
                chosen = index
                break
            if scheduled.job.overtaken >= MAX_OVERTAKEN:
                break
        for scheduled in order[:chosen]:
            scheduled.job.overtaken += 1
        taken = order[chosen]
        self.remove(taken)
        if taken.job.owner in self._by_owner:
            self._by_owner.move_to_end(taken.job.owner)
        return taken
