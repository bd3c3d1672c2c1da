"""Callers that went away, and may come back before their jobs are ended.

Lives on the event loop. A caller that cancelled its call looks like one whose connection was cut;
a job whose request can be made again under its id therefore waits a while for somebody to come back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Final

from chromarpc_server.domain.errors import ChromaError, JobCancelled, JobDeadlineExceeded
from chromarpc_server.domain.events import Cancelled
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.runtime.running_time import RunningTime

log = logging.getLogger(__name__)

_AWAY: Final = {"caller": "away"}
"""What the error of a job holds that was ended because nobody came back; the store keeps it."""


class Absences:
    """Waits for callers that went away."""

    def __init__(self, grace_s: float, running_time: RunningTime, end: Callable[[Job, ChromaError], None]) -> None:
        """`grace_s`: how long, in `running_time`: nobody can come back to a process that is paused; `end`: ends a
        job nobody came back to.
        """
        self._grace_s = grace_s
        self._running_time = running_time
        self._end = end

    def begin(self, job: Job) -> None:
        """Nobody holds on to the job any more: it is ended after a while, or at its caller's deadline."""
        job.stop_absence()
        deadline_at = job.cancellation.deadline_at
        left_s = math.inf if deadline_at is None else deadline_at - time.monotonic()
        if left_s < self._grace_s:
            job.absence = asyncio.get_running_loop().call_later(left_s, self._over, job)
        else:
            job.absence = self._running_time.call_later(self._grace_s, self._over, job)
        log.info("job.caller_away", extra={"job_id": job.id, "caller": job.owner, "grace_s": self._grace_s})

    def renew(self, job: Job) -> None:
        """Somebody is about to hold on to the job: it must not be ended in the meantime."""
        if job.absence is not None:
            self.begin(job)

    def _over(self, job: Job) -> None:
        job.absence = None
        if job.attached or job.plan.detached or job.log.suspended:
            return
        deadline_at = job.cancellation.deadline_at
        if deadline_at is not None and time.monotonic() >= deadline_at:
            self._end(job, JobDeadlineExceeded("the deadline passed before the job was done"))
        else:
            self._end(job, not_back(f"its caller went away and did not come back within {self._grace_s:g} s"))


def not_back(message: str) -> JobCancelled:
    """Ends a job because its caller was away."""
    return JobCancelled(message, metadata=_AWAY)


def is_abandoned(job: AnyJob) -> bool:
    """Whether a job is ended, or was, because its caller did not come back."""
    if isinstance(job, Job) and not job.log.sealed:
        cause = job.cancellation.cause
    else:
        ending = job.log.ending
        cause = ending.event.error if ending is not None and isinstance(ending.event, Cancelled) else None
    return isinstance(cause, JobCancelled) and cause.metadata == _AWAY
