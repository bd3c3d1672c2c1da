"""Who counts on a job, and what becomes of it when nobody does. Lives on the event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from chromarpc_server.domain.errors import ChromaError, Draining, JobCancelled, StoreError, StoreUnavailable
from chromarpc_server.jobs.absences import Absences, not_back
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import LOOK_EVERY_S, Completion
from chromarpc_server.jobs.housekeeping import HOUSEKEEPING_S
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.running_time import RunningTime

RETRY_AFTER_UNSTORED_S = HOUSEKEEPING_S


class Attendance:
    """Callers that hold on to jobs or watch them, and those that stop them."""

    def __init__(
        self,
        backlog: Backlog,
        completion: Completion,
        store: JobStore,
        tasks: Tasks,
        running_time: RunningTime,
        *,
        reattach_s: float,
    ) -> None:
        """Begins with nobody.

        Args:
            backlog: stops jobs that wait.
            completion: ends them.
            store: keeps that a job is cancelled.
            tasks: those of the engine.
            running_time: the event loop's.
            reattach_s: how long a caller that went away may take to come back.
        """
        self._backlog = backlog
        self._completion = completion
        self._store = store
        self._tasks = tasks
        self._absences = Absences(reattach_s, running_time, backlog.cancel)

    def attach(self, job: AnyJob) -> None:
        """A caller holds on to a job from now on, until `detach`."""
        if isinstance(job, Job):
            job.attached += 1
            job.is_left = False
            job.stop_absence()

    def detach(self, job: AnyJob, cause: ChromaError) -> None:
        """A caller that held on to a job let go; unless it may go on alone, or wait, the last one ends it."""
        if isinstance(job, Job):
            job.attached -= 1
            if job.attached <= 0:
                self.leave(job, cause)

    def watch(self, job: AnyJob) -> None:
        """A caller watches a job from now on, until `unwatch`, and has come back to it if nobody else has."""
        if isinstance(job, Job):
            job.watchers += 1
            job.stop_absence()

    def unwatch(self, job: AnyJob) -> None:
        """A caller watches a job no more."""
        if isinstance(job, Job):
            job.watchers -= 1
            if job.watchers <= 0 and job.attached <= 0 and job.plan.may_return:
                self.leave(job, JobCancelled("the caller cancelled or went away"))

    def leave(self, job: Job, cause: ChromaError) -> None:
        """Nobody holds on to a job any more."""
        if job.plan.detached or job.log.sealed or job.log.suspended:
            return
        if not (job.plan.may_return and isinstance(cause, JobCancelled)):
            self._backlog.cancel(job, cause)
        elif job.watchers <= 0:
            if job.is_left:
                self._tasks.start(self._cancel_left(job))
            else:
                self._absences.begin(job)

    def expect_back(self, job: Job) -> None:
        """A recovered job's caller may come back from now on, if nobody is there yet."""
        if job.attached <= 0 and job.watchers <= 0 and not job.log.sealed:
            self._absences.begin(job)

    def renew(self, job: Job) -> None:
        """A caller is about to hold on to the job: it must not be ended in the meantime."""
        self._absences.renew(job)

    async def wait_until_ended(self, job: AnyJob) -> None:
        """Returns once a job that is being stopped has ended.

        Raises:
            StoreUnavailable, Draining: its end cannot be stored now, or not by this process.
        """
        if isinstance(job, Job):
            async for _ in job.log.follow(job.log.last_sequence, idle_s=LOOK_EVERY_S):
                self._require_stored(job)

    async def cancel_for_good(self, job: AnyJob, *, when_unattended: bool = False) -> None:
        """Stops a job as `Backlog.cancel` does, and lets no later process go on with it. Returns once that is
        stored.

        Args:
            job: the job.
            when_unattended: leave it to those who hold on to it or watch it; the last one who goes ends it.
                One that goes on without callers is left alone.

        Raises:
            StoreUnavailable, Draining: it is not stored; this process has stopped the job all the same.
        """
        if not isinstance(job, Job) or (when_unattended and job.plan.detached):
            return
        if when_unattended and (job.attached > 0 or job.watchers > 0):
            job.is_left = True
        else:
            cause = not_back("its caller left") if when_unattended else JobCancelled("the job was cancelled")
            # Whole, although the caller may go away meanwhile.
            await asyncio.shield(self._tasks.start(self._cancel_for_good(job, cause)))

    async def _cancel_left(self, job: Job) -> None:
        with suppress(StoreError, Draining):  # stopped all the same, and nobody waits for an answer
            await self._cancel_for_good(job, not_back("its caller left"))

    async def _cancel_for_good(self, job: Job, cause: JobCancelled) -> None:
        is_noted = False
        if not job.log.sealed:
            job.cancelled_for_good = job.cancelled_for_good or cause
            self._backlog.cancel(job, cause)
        if not job.log.sealed and self._store.is_durable:
            await self._store.note_cancelled(job)
            is_noted = True
        if job.log.suspended and job.cancelled_for_good is not None:
            self._completion.end_early(job, job.cancelled_for_good)
        await self._completion.wait_until_visible(job)
        if not is_noted:
            self._require_stored(job)

    def _require_stored(self, job: Job) -> None:
        if self._completion.is_unstored(job):
            raise StoreUnavailable("the job's end cannot be stored now", retry_after_s=RETRY_AFTER_UNSTORED_S)
