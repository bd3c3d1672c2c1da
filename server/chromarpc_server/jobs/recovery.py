"""Jobs that an earlier process was told to run: what they need, found again, and found to be the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from chromarpc_server.adapters.root_hashes import WAIT_S
from chromarpc_server.adapters.sources import AdapterSources, FoundAdapters
from chromarpc_server.domain.errors import AttemptsExhausted, JobCancelled, LoraChanged, LoraNotFound, NotKept
from chromarpc_server.domain.events import Accepted, AdapterReport, Restarted
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.store import records
from chromarpc_server.jobs.store.job_store import Unfinished
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.runtime.cancellation import Cancellation

SEQUENCES_A_START = 2**20
"""Events of one job in one process are fewer, so that no number comes twice."""


def restored_job(stored: Unfinished, *, picture_records: bool) -> Job:
    """The job, as it was admitted; without `picture_records` its pictures carry none, whatever was said then."""
    plan = stored.plan
    if plan.output.picture_record and not picture_records:
        plan = replace(plan, output=replace(plan.output, picture_record=False))
    created = records.from_microseconds(stored.created_us)
    age_s = max(0.0, (datetime.now(UTC) - created).total_seconds())
    return Job(
        plan=plan,
        adapter_files=(),
        cancellation=Cancellation(),
        owner=stored.owner,
        id=stored.id,
        admitted_at=time.monotonic() - age_s,
        fingerprint=stored.fingerprint,
        created=created,
        attempts=stored.attempts,
        adapter_hashes=tuple(None if known is None else known.sha256 for known in stored.adapters),
    )


def tell_again(job: Job, starts: int) -> None:
    """Begins a restored job's log: watchers have read what earlier processes told of it."""
    job.log.append(Accepted(job.id, job.plan))
    job.log.skip_to(starts * SEQUENCES_A_START)
    if job.attempts:
        job.log.append(Restarted(job.attempts + 1))


def refuse_hopeless(stored: Unfinished, max_attempts: int) -> None:
    """Raises what ends a job that this process need not try.

    Raises:
        JobCancelled: its caller was told that it is stopped.
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


async def find_again(stored: Unfinished, sources: AdapterSources) -> FoundAdapters:
    """The job's adapters; those to be fetched again are left open.

    Raises:
        LoraChanged: one is not what it was, or is gone.
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
        except LoraNotFound:
            if not lora.is_url:
                raise LoraChanged("the adapter went away while the server was restarted", field=field) from None
            found = FoundAdapters((None,))
        (file,) = found.files
        if file is None and stored.needs_token:
            raise NotKept(
                "the server was restarted before the adapter was fetched, and does not store tokens", field=field
            )
        if file is not None and known is not None and known.sha256 is None and not known.is_still(file):
            raise LoraChanged("the adapter was written anew while the server was restarted", field=field)
        files.append(file)
    return FoundAdapters(tuple(files))


def require_same(job: Job, reports: Sequence[AdapterReport]) -> LoraChanged | None:
    """What is wrong with the adapters that were read, where a job that ran before had others."""
    for index, (report, sha256) in enumerate(zip(reports, job.adapter_hashes, strict=False)):
        if sha256 is not None and report.sha256 != sha256:
            return LoraChanged(
                "the adapter has other bytes than before the server was restarted",
                field=f"loras.{index}.path",
                metadata={"sha256_before": sha256, "sha256_now": report.sha256},
            )
    return None


def known_adapters(job: Job, hashes: Sequence[str | None]) -> list[KnownAdapter]:
    """What to remember of a job's adapters, all of which are here."""
    return [KnownAdapter.of(file, sha256) for file, sha256 in zip(job.adapter_files, hashes, strict=True)]
