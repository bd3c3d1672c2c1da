"""The store as the event loop sees it: everything on one thread, in the order it was asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from chromarpc_server.domain.errors import Draining, JobNotFound, StoreUnavailable
from chromarpc_server.domain.events import Accepted, Cancelled, Completed, Failed, ImageHeader
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.encoding import CHUNK_BYTES
from chromarpc_server.jobs.job import AnyJob, EndedJob, Job
from chromarpc_server.jobs.log import EndedLog, LoggedEvent, StoredEvent
from chromarpc_server.jobs.store import records
from chromarpc_server.jobs.store.database import FILE, Database, EndRow, NewRow, StoreSize
from chromarpc_server.jobs.store.images import ImageFolder, ImageMemory, Images
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.jobs.store.unusable import StoreUnusable

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
_STATES = {Completed: SUCCEEDED, Failed: FAILED, Cancelled: CANCELLED}

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Unfinished:
    """A job that an earlier process was to run."""

    id: str
    owner: str
    plan: Plan
    fingerprint: str
    created_us: int
    has_prompts: bool
    needs_token: bool
    adapters: tuple[KnownAdapter | None, ...]
    starts: int
    """Processes that took it over, this one included."""
    attempts: int
    """How often it was begun, but for stops in good order."""
    was_begun: bool
    """Whether it ever was."""
    is_cancelled: bool
    """Whether its cancellation was acknowledged."""


class JobStore:
    """Keeps jobs, on disk or in memory."""

    def __init__(
        self,
        database: Database,
        images: Images,
        thread: ThreadPoolExecutor,
        *,
        is_durable: bool,
        keeps_prompts: bool,
    ) -> None:
        """See `open`.

        Args:
            database: has the rows.
            images: have the images' bytes.
            thread: everything happens on it.
            is_durable: whether another process will find what this one kept.
            keeps_prompts: whether plans are kept with what their prompts say.
        """
        self._database = database
        self._images = images
        self._thread = thread
        self.is_durable = is_durable
        self._keeps_prompts = keeps_prompts
        self._closed = False

    @classmethod
    async def open(cls, folder: Path | None, retention: JobRetention, *, keeps_prompts: bool = True) -> JobStore:
        """Opens the store in a folder, or one in memory.

        Args:
            folder: where it lies; None for one in memory.
            retention: how long jobs that ended are kept.
            keeps_prompts: whether one on disk gets to see what prompts say.

        Raises:
            StoreUnusable: the folder cannot be used; the message says why and what to do.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(thread, cls._open, folder, retention, thread, keeps_prompts)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    @classmethod
    def _open(
        cls, folder: Path | None, retention: JobRetention, thread: ThreadPoolExecutor, keeps_prompts: bool
    ) -> JobStore:
        if folder is None:
            memory = ImageMemory()
            return cls(Database(None, memory, retention), memory, thread, is_durable=False, keeps_prompts=True)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            images = ImageFolder(folder / "images")
            # SQLite gives its other files the mode of this one.
            os.close(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            message = f"the job store {folder} cannot be used: {error.strerror}; see --data-dir and --store"
            raise StoreUnusable(message) from None
        return cls(
            Database(folder / FILE, images, retention),
            images,
            thread,
            is_durable=True,
            keeps_prompts=keeps_prompts,
        )

    @property
    def size(self) -> StoreSize:
        """How much is kept of jobs that ended."""
        return self._database.size

    async def insert(self, job: Job, *, needs_token: bool, adapters: Sequence[KnownAdapter | None]) -> None:
        """Keeps a job that was admitted.

        Args:
            job: the job.
            needs_token: whether its adapters are fetched with a token, which is not kept.
            adapters: what is known of each, None for one to be fetched.

        Raises:
            StoreUnavailable: it cannot be kept.
        """
        row = NewRow(
            id=job.id,
            owner=job.owner,
            request_id=job.plan.request_id,
            fingerprint=job.fingerprint,
            created_us=records.microseconds(job.created),
            plan=records.plan_json(job.plan, with_prompts=self._keeps_prompts),
            has_prompts=self._keeps_prompts,
            needs_token=needs_token,
            adapters=records.adapters_json(adapters),
        )
        await self._ask(self._database.insert, row)

    async def begin(self, job: Job) -> None:
        """Counts an attempt before it is made.

        Raises:
            StoreUnavailable: it cannot be counted.
        """
        started = 0 if job.started is None else records.microseconds(job.started)
        await self._ask(self._database.begin, job.id, started)

    async def unbegin(self, job: Job) -> None:
        """Takes the count back.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.unbegin, job.id)

    async def note_adapters(self, job: Job, adapters: Iterable[KnownAdapter | None]) -> None:
        """Keeps what is known of a job's adapters by now.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.note_adapters, job.id, records.adapters_json(adapters))

    async def note_detached(self, job: Job) -> None:
        """Keeps that a job goes on without its callers.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.note_detached, job.id)

    async def note_cancelled(self, job: Job) -> None:
        """Keeps that a job is to be stopped, whichever process has it.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.note_cancelled, job.id)

    async def release_request_id(self, job: AnyJob) -> None:
        """Lets another job have the request id of one that ended.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.release_request_id, job.id)

    async def put_image(self, header: ImageHeader, data: bytes) -> None:
        """Keeps an image of a job that runs.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.put_image, header.sha256, data)

    async def finish(self, job: Job, ending: LoggedEvent) -> bool:
        """Keeps a job's end, its events and its images. Returns False where it had an end already.

        Raises:
            StoreUnavailable: it cannot.
        """
        return await self._ask(self._finish, job.id, job.done_steps, job.log.headers, job.log.entries, ending)

    def _finish(
        self,
        job_id: str,
        done_steps: int,
        headers: tuple[ImageHeader, ...],
        entries: tuple[LoggedEvent, ...],
        ending: LoggedEvent,
    ) -> bool:
        kept = tuple(header for header in headers if self._database.has_image(header.sha256))
        lost = {header.prompt_index for header in headers if header not in kept}
        if lost and isinstance(ending.event, Completed):
            raise StoreUnavailable("its images could not be stored")
        entries = tuple(entry for entry in entries if getattr(entry.event, "prompt_index", -1) not in lost)
        row = EndRow(
            id=job_id,
            ended_us=records.microseconds(ending.time),
            state=_STATES[type(ending.event)],
            done_steps=done_steps,
            ending=records.ending_json(ending),
            headers=records.headers_json(kept),
            events=records.pack_events(entries),
            images=[header.sha256 for header in kept],
            image_bytes=sum(header.size_bytes for header in kept),
        )
        return self._database.finish(row)

    async def take_over(self) -> list[Unfinished]:
        """What earlier processes left to do, in the order of admission.

        Raises:
            StoreUnavailable: it cannot be read.
            StoreUnusable: what a job says makes no sense.
        """
        return [_unfinished(row) for row in await self._ask(self._database.take_over)]

    async def ended(self, owner: str, job_id: str) -> EndedJob | None:
        """One of the owner's jobs that ended.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        row = await self._ask(self._database.ended, owner, job_id)
        return None if row is None else self._restore(row)

    async def ended_by_request(self, owner: str, request_id: str) -> EndedJob | None:
        """The one that was made under a request id.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        row = await self._ask(self._database.ended_by_request, owner, request_id)
        return None if row is None else self._restore(row)

    async def page(
        self,
        owner: str,
        limit: int,
        *,
        before: tuple[int, str] | None,
        since_us: int | None,
        states: Sequence[str] | None,
    ) -> list[EndedJob]:
        """See `Database.page`.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        find = partial(self._database.page, before=before, since_us=since_us, states=states)
        return [self._restore(row) for row in await self._ask(find, owner, limit)]

    async def delete(self, job_id: str) -> bool:
        """Forgets a job that ended. Returns whether there was one.

        Raises:
            StoreUnavailable: it cannot.
        """
        return await self._ask(self._database.delete, job_id)

    async def sweep(self) -> None:
        """Forgets what need not be kept longer.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._ask(self._database.sweep)

    async def close(self) -> None:
        """Ends it, after everything that was asked before."""
        loop = asyncio.get_running_loop()
        self._closed = True
        await loop.run_in_executor(self._thread, self._database.close)
        self._thread.shutdown(wait=False)

    def _restore(self, row: sqlite3.Row) -> EndedJob:
        plan = records.read_plan(row["plan"])
        job_id = row["id"]
        accepted = Accepted(job_id, plan)
        ending = records.read_ending(row["ending"])
        started_us = row["started_us"]

        async def load() -> tuple[StoredEvent, ...]:
            data = await self._ask(self._database.events, job_id)
            if data is None:
                raise _deleted()
            return records.unpack_events(data, accepted)

        return EndedJob(
            plan=plan,
            owner=row["owner"],
            id=job_id,
            log=EndedLog(
                ending,
                records.read_headers(row["headers"]),
                load=load,
                read=self._read_image,
                chunk_bytes=CHUNK_BYTES,
            ),
            fingerprint=row["fingerprint"],
            created=records.from_microseconds(row["created_us"]),
            started=None if started_us is None else records.from_microseconds(started_us),
            attempts=row["attempts"],
            done_steps=row["done_steps"],
        )

    async def _read_image(self, header: ImageHeader, offset: int, size: int) -> bytes:
        try:
            return await asyncio.to_thread(self._images.read, header.sha256, offset, size)
        except FileNotFoundError:
            raise _deleted() from None
        except OSError as error:
            raise _unreachable("read_image", error) from None

    async def _ask(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise Draining("the server is stopping", retry_after_s=RETRY_AFTER_S)
        try:
            return await loop.run_in_executor(self._thread, partial(call, *args, **kwargs))
        except (sqlite3.Error, OSError) as error:
            raise _unreachable(getattr(call, "__name__", "page"), error) from None


def _unfinished(row: sqlite3.Row) -> Unfinished:
    try:
        plan, adapters = records.read_plan(row["plan"]), records.read_adapters(row["adapters"])
    except (ValueError, TypeError):
        # Their messages quote what they could not read: prompts.
        raise StoreUnusable(
            f"the job {row['id']} in the job store cannot be read and was left as it is: run the version of "
            "chromarpc that wrote it, restore the store from a backup, or move it away to begin with an empty one"
        ) from None
    return Unfinished(
        id=row["id"],
        owner=row["owner"],
        plan=plan,
        fingerprint=row["fingerprint"],
        created_us=row["created_us"],
        has_prompts=bool(row["has_prompts"]),
        needs_token=bool(row["needs_token"]),
        adapters=adapters,
        starts=row["starts"],
        attempts=row["attempts"],
        was_begun=row["started_us"] is not None,
        is_cancelled=bool(row["cancelled"]),
    )


def _unreachable(call: str, error: Exception) -> StoreUnavailable:
    # Never the statement's values: prompts are among them.
    log.error("store.failed", extra={"call": call, "error": str(error)})
    message = "the server cannot reach its job store now; it is out of room or fails"
    return StoreUnavailable(message, retry_after_s=RETRY_AFTER_S)


def _deleted() -> JobNotFound:
    return JobNotFound("the job was deleted meanwhile", field="job_id")
