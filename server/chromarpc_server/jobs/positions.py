"""Tells jobs that wait their place in the queue, and how long they will wait. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from chromarpc_server.domain.events import Queued
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

    def changed(self, arrived: ScheduledJob | None = None) -> None:
        """The queue is another one. A job that has arrived is told at once, the others soon."""
        if self._due is None and asyncio.get_running_loop().time() >= self._quiet_until:
            self._tell_all()
            return
        if arrived is not None:
            self._tell(lambda scheduled: scheduled is arrived)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_at(self._quiet_until, self._tell_all)

    def _tell_all(self) -> None:
        self._due = None
        if len(self._queue):
            self._tell(lambda _: True)
            self._quiet_until = asyncio.get_running_loop().time() + S_PER_JOB * len(self._queue)

    def _tell(self, whom: Callable[[ScheduledJob], bool]) -> None:
        waits = self._waits()
        for position, scheduled in enumerate(self._queue, 1):
            job = scheduled.job
            wait_s = waits.add(job)
            if job.position != position and whom(scheduled):
                job.position = position
                job.log.append(Queued(position, wait_s))
