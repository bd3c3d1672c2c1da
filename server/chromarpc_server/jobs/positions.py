"""Tells jobs that wait their place in the queue, and how long they will wait. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from chromarpc_server.domain.events import Queued
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import JobQueue, ScheduledJob
from chromarpc_server.jobs.waits import Waits

S_PER_JOB = 0.001
"""After all jobs were told, they are not told again for so long, times their number: a thousand that wait for five
hundred devices would be told a hundred times a second, and whoever watches them too.
"""


class Positions:
    """What jobs were told of the queue."""

    def __init__(self, queue: JobQueue, waits: Callable[[], Waits]) -> None:
        """`waits`: of what runs now."""
        self._queue = queue
        self._waits = waits
        self._quiet_until = 0.0
        self._due: asyncio.TimerHandle | None = None
        self._ahead = Waits(StepTimes(), ())
        """With all that wait, as they did when they were last told, and that arrived since."""
        self._wait_s: deque[float | None] = deque()
        """How long each place in the queue waits, as of then: who comes in between moves the others on, who goes
        takes the first place along.
        """

    def changed(self, arrived: ScheduledJob | None = None) -> None:
        """A job has arrived, which is told at once, or one has gone; the others are told soon."""
        if arrived is not None:
            self._wait_s.append(self._ahead.add(arrived.job))
        elif self._wait_s:
            self._wait_s.popleft()
        loop = asyncio.get_running_loop()
        if self._due is None and loop.time() >= self._quiet_until:
            self._tell_all()
            return
        if arrived is not None:
            position = self._queue.position(arrived)
            _tell(arrived.job, position, self._wait_s[position - 1])
        if self._due is None:
            self._due = loop.call_at(self._quiet_until, self._tell_all)

    def devices_changed(self) -> None:
        """What is known of waits holds no longer: whatever comes next, all are told."""
        self._quiet_until = 0.0
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _tell_all(self) -> None:
        self._due = None
        self._ahead = self._waits()
        self._wait_s.clear()
        for position, scheduled in enumerate(self._queue, 1):
            wait_s = self._ahead.add(scheduled.job)
            self._wait_s.append(wait_s)
            _tell(scheduled.job, position, wait_s)
        self._quiet_until = asyncio.get_running_loop().time() + S_PER_JOB * len(self._queue)


def _tell(job: Job, position: int, wait_s: float | None) -> None:
    if job.position != position:
        job.position = position
        job.log.append(Queued(position, wait_s))
