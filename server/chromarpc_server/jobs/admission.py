"""From a submission to a job: found again, or admitted whole. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.sources import AdapterSources, FoundAdapters
from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import JobCancelled, QuotaExceeded, StoreError
from chromarpc_server.domain.events import Accepted
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.absences import is_abandoned
from chromarpc_server.jobs.attendance import Attendance
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.estimates import stored_bytes
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.jobs.recovery import recover_adapters
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.jobs.submission import Submission
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_files import ModelFiles

log = logging.getLogger(__name__)


class Admission:
    """Admits jobs."""

    def __init__(
        self,
        adapters: AdapterSources,
        model_files: ModelFiles,
        registry: JobRegistry,
        store: JobStore,
        backlog: Backlog,
        attendance: Attendance,
        tasks: Tasks,
    ) -> None:
        """Begins with nothing.

        Args:
            adapters: where adapters come from.
            model_files: where models lie.
            registry: knows the jobs that there are.
            store: keeps a job before its caller gets an answer.
            backlog: takes admitted jobs.
            attendance: learns of callers that are back, or went away meanwhile.
            tasks: those of the engine.
        """
        self._adapters = adapters
        self._model_files = model_files
        self._registry = registry
        self._store = store
        self._backlog = backlog
        self._attendance = attendance
        self._tasks = tasks
        self._searching: set[asyncio.Task[Any] | None] = set()
        """Tasks that look for a job's adapters, and have stored nothing of it yet."""

    async def submit(self, submission: Submission) -> tuple[AnyJob, bool]:
        """Admits a job, whose log then fills by itself, or finds the one that the same request made.

        Returns:
            The job, and whether it was there already.

        Raises:
            RequestIdReused: another request was made under the plan's request id.
            LoraNotFound: an adapter is not below the adapter root.
            LoraChanged, NotKept: an adapter of the job that is drawn again is not what it was, or cannot be had.
            InvalidParameter: an adapter is a URL, and this server fetches none.
            WeightsMissing: the model's files are not on this machine.
            QuotaExceeded: the caller has as many jobs waiting as it may, or may not have one of this size.
            QueueFull, Draining, DiskFull, StoreUnavailable: no job is taken now.
        """
        submitting = self._tasks.start(self._submit(submission))
        try:
            # Stored or not, but never half: the caller may go away meanwhile.
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(self._caller_went_away)
            if submitting in self._searching:
                submitting.cancel()
            raise

    def _caller_went_away(self, submitting: asyncio.Task[tuple[AnyJob, bool]]) -> None:
        """The caller went away before it got an answer."""
        if submitting.cancelled() or submitting.exception() is not None:
            return
        job, existed = submitting.result()
        if isinstance(job, Job) and not existed and not job.attached:
            self._attendance.leave(job, JobCancelled("the caller cancelled or went away"))

    async def _submit(self, submission: Submission) -> tuple[AnyJob, bool]:
        owner, request_id = submission.caller.name, submission.plan.request_id
        async with self._registry.creating(owner, request_id):
            known = await self._registry.existing(owner, request_id, submission.fingerprint)
            if known is not None and not await self._release_if_abandoned(known):
                await self._join(known, submission)
                return known, True
            return await self._admit(submission), False

    async def _join(self, known: AnyJob, submission: Submission) -> None:
        """One more caller counts on a job, which the earlier ones' deadlines and leaving may not end any more."""
        if not isinstance(known, Job):
            return
        self._attendance.renew(known)
        known.cancellation.wait_longer(submission.deadline_at)
        if submission.plan.detached and not known.plan.detached:
            before = known.plan
            known.plan = replace(before, detached=True)
            try:
                await self._store.note_detached(known)
            except StoreError:
                known.plan = before
                raise
            known.stop_absence()

    async def _release_if_abandoned(self, known: AnyJob) -> bool:
        """Releases the request id of a job that ended only because its caller did not come back, and says so."""
        if not is_abandoned(known):
            return False
        await self._attendance.wait_until_ended(known)  # at most a step, where it still runs
        if not is_abandoned(known):
            return False
        await self._store.release_request_id(known)
        return True

    async def _admit(self, submission: Submission) -> Job:
        plan, caller, redrawn = submission.plan, submission.caller, submission.redrawn
        before = (None,) * len(plan.loras) if redrawn is None else redrawn.adapters
        _require_size(plan, caller)
        self._backlog.require_room(caller)
        taken = sum(stored_bytes(job.plan) for job in self._registry.unfinished())
        await self._store.require_room(taken + stored_bytes(plan))
        searching = asyncio.current_task()
        self._searching.add(searching)
        try:
            found = await self._find_adapters(submission)
        finally:
            self._searching.discard(searching)
        model_files = await asyncio.to_thread(self._model_files.require, submission.spec)
        self._backlog.require_room(caller)
        job = Job(
            plan,
            found.complete,
            Cancellation(submission.deadline_at),
            owner=caller.name,
            fingerprint=submission.fingerprint.current,
            adapter_hashes=tuple(None if known is None else known.sha256 for known in before),
        )
        needs_token = submission.hf_token is not None and None in found.files
        if redrawn is not None:
            needs_token = redrawn.needs_token
        with self._backlog.entering(caller):
            await self._store.insert(
                job,
                needs_token=needs_token,
                adapters=[_remembered(*adapter) for adapter in zip(found.files, before, strict=True)],
            )
        self._registry.add(job)
        job.log.append(Accepted(job.id, plan))
        log.info(
            "job.accepted",
            extra={
                "job_id": job.id,
                "caller": job.owner,
                "model": plan.served_model,
                "profile": plan.profile,
                "images": len(plan.prompts),
                "adapters": len(plan.loras),
                "pixel_steps": plan.pixel_steps,
            },
        )
        self._backlog.schedule(ScheduledJob(job, model_files, found), submission.hf_token)
        return job

    async def _find_adapters(self, submission: Submission) -> FoundAdapters:
        if submission.redrawn is not None:
            return await recover_adapters(submission.redrawn, self._adapters)
        return await self._adapters.find(submission.plan.loras, submission.caller.name)


def _remembered(file: AdapterFile | None, before: KnownAdapter | None) -> KnownAdapter | None:
    """What to remember of an adapter, of which an earlier job may know the hash."""
    if file is None:
        return before
    return KnownAdapter.of(file, None if before is None else before.sha256)


def _require_size(plan: Plan, caller: Caller) -> None:
    limit = caller.limits.max_pixel_steps
    if plan.pixel_steps > limit:
        raise QuotaExceeded.of(
            "caller",
            "max_pixel_steps",
            limit,
            f"width × height × calls of the model come to {plan.pixel_steps}, and you may ask for {limit} at once",
        )
