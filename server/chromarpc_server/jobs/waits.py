"""How long jobs will wait: each goes to the device that is free first, of those that can compute it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from heapq import heapify, heapreplace

from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import Taker


class Waits:
    """Devices and when each will be free, seen from now. Jobs are added in the order in which they will run."""

    def __init__(self, estimates: StepTimes, takers: Sequence[tuple[Taker, Job | None]]) -> None:
        """`takers`: devices that are ready, with what they run."""
        self._estimates = estimates
        self._takers = [taker for taker, _ in takers]
        self._free_s = [0.0 if job is None else self._left_s(taker, job) for taker, job in takers]
        """Seconds until each is free; infinite where its job was not measured yet."""
        self._by_need: dict[tuple[str, str, str], list[tuple[float, int]]] = {}
        """For jobs alike the devices that can compute them, as a heap. An entry may be older than `_free_s`, and
        then says less.
        """

    def add(self, job: Job) -> float | None:
        """Seconds until the job will begin; None where that is not known, or no device can compute it."""
        heap = self._able(job)
        while heap and heap[0][0] < self._free_s[heap[0][1]]:
            heapreplace(heap, (self._free_s[heap[0][1]], heap[0][1]))
        if not heap or heap[0][0] == math.inf:
            return None
        begins_s, index = heap[0]
        self._free_s[index] += self._left_s(self._takers[index], job)
        return begins_s

    def add_all(self, jobs: Iterable[Job]) -> float | None:
        """Seconds until these and all before them will be done; None where that is not known."""
        if any(self.add(job) is None for job in jobs):
            return None
        done_s = max(self._free_s, default=math.inf)
        return None if done_s == math.inf else done_s

    def _able(self, job: Job) -> list[tuple[float, int]]:
        need = (job.plan.served_model, job.plan.profile, job.stays_on)
        if need not in self._by_need:
            able = [
                (free_s, index)
                for index, (taker, free_s) in enumerate(zip(self._takers, self._free_s, strict=True))
                if taker.can_compute(job)
            ]
            heapify(able)
            self._by_need[need] = able
        return self._by_need[need]

    def _left_s(self, taker: Taker, job: Job) -> float:
        """Seconds that a job will still take on a device; infinite while nothing was measured."""
        left = max(0, job.plan.pixel_steps - job.pixel_steps_done)  # a schedule may have more steps than asked for
        left_s = self._estimates.estimate_s(taker.model, job.plan.served_model, job.plan.profile, left)
        return math.inf if left_s is None else left_s
