"""Jobs that an earlier process was to run: what they need, recovered, and found to be the same."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from chromarpc_server.adapters.root_hashes import WAIT_S
from chromarpc_server.adapters.sources import AdapterSources, FoundAdapters
from chromarpc_server.domain.errors import (
    AttemptsExhausted,
    ChromaError,
    JobCancelled,
    LoraChanged,
    LoraNotFound,
    ModelNotFound,
    NotKept,
    StoreError,
)
from chromarpc_server.domain.events import Accepted, Restarted
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.completion import Completion
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store import records
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.stored_jobs import StoredRequest, Unfinished
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_files import ModelFiles

log = logging.getLogger(__name__)

ROOM_EVERY_S = 2.0
"""How often a store on a full disk is tried again."""
SEQUENCES_A_START = 2**20
"""Events of one job in one process are fewer, so that no number comes twice."""


@dataclass(frozen=True)
class RecoveryRules:
    """How jobs are recovered."""

    max_attempts: int
    """A job that was begun as often is not begun again."""
    picture_records: bool
    """Whether images may carry what they were drawn with, whatever was planned in an earlier process."""


class Recovery:
    """Takes over jobs that an earlier process was to run. Lives on the event loop."""

    def __init__(
        self,
        adapters: AdapterSources,
        model_files: ModelFiles,
        registry: JobRegistry,
        store: JobStore,
        backlog: Backlog,
        completion: Completion,
        rules: RecoveryRules,
    ) -> None:
        """Begins with nothing.

        Args:
            adapters: where adapters come from.
            model_files: where models lie.
            registry: is to know the jobs.
            store: has them.
            backlog: takes those that can run.
            completion: ends the others.
            rules: which can.
        """
        self._adapters = adapters
        self._model_files = model_files
        self._registry = registry
        self._store = store
        self._backlog = backlog
        self._completion = completion
        self._rules = rules
        self._without_caller: list[Job] = []
        self._expect_back: Callable[[Job], None] | None = None
        self._waiting: asyncio.Task[None] | None = None
        """For room to count this process; jobs may not run before, as their events would get numbers twice."""
        self._parked: list[Job] = []

    async def recover(self, models: Mapping[str, ModelSpec]) -> int:
        """Takes over every job that has not ended. Returns how many.

        Args:
            models: those that are served, by id.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        unfinished, is_counted = await self._store.take_over()
        jobs = []
        for stored in unfinished:
            job = recovered_job(
                stored, picture_records=self._rules.picture_records, age_s=self._store.age_s(stored)
            )
            self._registry.add(job)
            job.log.append(Accepted(job.id, job.plan))
            if not is_counted:  # watchers that come back meanwhile have read more of it than this
                job.log.skip_to((stored.starts + 1) * SEQUENCES_A_START)
            jobs.append((job, stored))
        if is_counted:
            await self._resume(jobs, models)
        elif jobs:
            log.warning("store.full", extra={"doing": "resume jobs", "waiting_jobs": len(jobs)})
            self._parked = [job for job, _ in jobs]
            self._waiting = asyncio.create_task(self._resume_when_there_is_room(jobs, models), name="recovery")
        return len(unfinished)

    async def stop(self) -> None:
        """Leaves jobs that wait for room to the next process."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)
        for job in self._parked:
            self._completion.leave_to_next_process(job)

    async def _resume_when_there_is_room(
        self, jobs: Sequence[tuple[Job, Unfinished]], models: Mapping[str, ModelSpec]
    ) -> None:
        while True:
            await asyncio.sleep(ROOM_EVERY_S)
            with suppress(StoreError):
                await self._store.count_start()
                break
        log.info("store.room_again", extra={"resumed_jobs": len(jobs)})
        await self._resume([(job, replace(stored, starts=stored.starts + 1)) for job, stored in jobs], models)

    async def _resume(self, jobs: Sequence[tuple[Job, Unfinished]], models: Mapping[str, ModelSpec]) -> None:
        for job, stored in jobs:
            go_on(job, stored.starts)
            log.info("job.resumed", extra={"job_id": job.id, "caller": job.owner, "attempts_before": job.attempts})
            try:
                await self._schedule(job, stored, models)
            except ChromaError as error:
                self._completion.end_early(job, error)
            except Exception as error:  # noqa: BLE001 - the job's failure, with an id that the log has too
                self._completion.end_unforeseen(job, error)
            if job in self._parked:
                self._parked.remove(job)

    def expect_callers(self, expect_back: Callable[[Job], None]) -> None:
        """Has a function called with each recovered job whose caller may come back, now and from now on."""
        self._expect_back = expect_back
        found, self._without_caller = self._without_caller, []
        for job in found:
            expect_back(job)

    async def _schedule(self, job: Job, stored: Unfinished, models: Mapping[str, ModelSpec]) -> None:
        if job.cancelled_for_good is not None:  # while it waited for room
            raise job.cancelled_for_good
        require_recoverable(stored, self._rules.max_attempts)
        spec = models.get(job.plan.served_model)
        if spec is None:
            raise ModelNotFound(f"the server was restarted, and serves no model {job.plan.served_model}")
        found = await recover_adapters(stored, self._adapters)
        model_files = await asyncio.to_thread(self._model_files.require, spec)
        job.adapter_files = found.complete
        # One that was running has waited its time already, and is to be run again.
        self._backlog.schedule(ScheduledJob(job, model_files, found), may_expire=not stored.was_begun)
        if job.plan.detached:
            return
        if self._expect_back is None:
            self._without_caller.append(job)
        else:  # it waited for room until after the start
            self._expect_back(job)


def plan_for_now(plan: Plan, *, picture_records: bool) -> Plan:
    """A stored plan as this process runs it; without `picture_records` its images carry none, planned or not."""
    if plan.output.picture_record and not picture_records:
        return replace(plan, output=replace(plan.output, picture_record=False))
    return plan


def recovered_job(stored: Unfinished, *, picture_records: bool, age_s: float) -> Job:
    """The job, as it was admitted `age_s` ago; `picture_records` as for `plan_for_now`."""
    return Job(
        plan=plan_for_now(stored.plan, picture_records=picture_records),
        adapter_files=(),
        cancellation=Cancellation(),
        owner=stored.owner,
        id=stored.id,
        admitted_at=time.monotonic() - age_s,
        fingerprint=stored.fingerprint,
        created=records.from_microseconds(stored.created_us),
        attempts=stored.attempts,
        adapter_hashes=tuple(None if known is None else known.sha256 for known in stored.adapters),
    )


def go_on(job: Job, starts: int) -> None:
    """Goes on with a recovered job's log: watchers have read what earlier processes wrote into it."""
    job.log.skip_to(starts * SEQUENCES_A_START)
    if job.attempts:
        job.log.append(Restarted(job.attempts + 1))


def require_recoverable(stored: Unfinished, max_attempts: int) -> None:
    """Raises what ends a job that this process need not try.

    Raises:
        JobCancelled: an earlier process acknowledged that it is cancelled.
        AttemptsExhausted: it was begun as often as it may be.
        NotKept: its prompts were not stored.
    """
    if stored.is_cancelled:
        raise JobCancelled("the job was cancelled")
    if stored.attempts >= max_attempts:
        raise AttemptsExhausted(
            f"the server was stopped {stored.attempts} times while it ran the job, and tries no more",
            metadata={"attempts": str(stored.attempts)},
        )
    if not stored.has_prompts:
        raise NotKept("the server was restarted, and is set to store no prompts", field="prompts")


async def recover_adapters(stored: StoredRequest, sources: AdapterSources) -> FoundAdapters:
    """The adapters that a stored job had; those to be fetched again are left open.

    Raises:
        LoraChanged: one is not what it was, or is gone.
        LoraNotFound: one is not found yet, since files are still being hashed; ask again.
        NotKept: one is to be fetched with a token, which was not stored.
    """
    loras = stored.plan.loras
    files = []
    for index, (lora, known) in enumerate(zip(loras, stored.adapters, strict=True)):
        field = f"loras.{index}.path"
        asked = lora
        if lora.is_url and known is not None and known.sha256 is not None:
            asked = replace(lora, path=f"sha256:{known.sha256}")
        elif known is not None:
            await sources.recall(lora.path, known.is_still)
        try:
            # What was fetched lies among the downloads, or is fetched again: nothing is hashed for it.
            wait_s = 0 if lora.is_url else WAIT_S
            found = await sources.find([asked], stored.owner, first=index, wait_s=wait_s)
        except LoraNotFound as error:
            if error.retry_after_s is not None and not lora.is_url:
                raise
            if not lora.is_url:
                raise LoraChanged("the adapter went away since the job was accepted", field=field) from None
            found = FoundAdapters((None,))
        (file,) = found.files
        if file is None and stored.needs_token:
            raise NotKept("the adapter would have to be fetched with a token, and none is stored", field=field)
        if file is not None and known is not None and known.sha256 is None and not known.is_still(file):
            raise LoraChanged("the adapter was written anew since the job was accepted", field=field)
        files.append(file)
    return FoundAdapters(tuple(files))
