"""The store as the event loop sees it: everything on one thread, in the order it was asked for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.errors import JobDamaged
from chromarpc_server.domain.events import Accepted, Cancelled, Completed, Failed, ImageHeader
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.domain.store_facts import StoreFacts
from chromarpc_server.durable import sync_folder
from chromarpc_server.jobs.job import AnyJob, DamagedJob, EndedJob, Job
from chromarpc_server.jobs.log import LoggedEvent, StoredEvent
from chromarpc_server.jobs.store import records, stored_jobs
from chromarpc_server.jobs.store.database import Database
from chromarpc_server.jobs.store.images import ImageFolder, ImageMemory, Images
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.jobs.store.rows import CANCELLED, FAILED, SUCCEEDED, AnyRow, EndRow, NewRow, StoreSize
from chromarpc_server.jobs.store.sqlite_file import FILE
from chromarpc_server.jobs.store.store_thread import ImageReader, ImagesNotStored, StoreThread, deleted
from chromarpc_server.jobs.store.stored_jobs import StoredRequest, Unfinished
from chromarpc_server.jobs.store.unusable import StoreUnusable

_STATES = {Completed: SUCCEEDED, Failed: FAILED, Cancelled: CANCELLED}


class JobStore:
    """Keeps jobs, on disk or in memory."""

    def __init__(
        self,
        database: Database,
        images: Images,
        thread: StoreThread,
        *,
        lock: StoreLock | None = None,
        room: DiskRoom | None = None,
        keeps_prompts: bool,
    ) -> None:
        """See `open`.

        Args:
            database: has the rows.
            images: have the images' bytes.
            thread: everything happens on it.
            lock: of the folder, held; None for a store that no other process will find.
            room: on the disk; None for a store that is on none.
            keeps_prompts: whether plans are kept with what their prompts say.
        """
        self._database = database
        self._images = images
        self._thread = thread
        self._lock = lock
        self._room = room
        self.is_durable = lock is not None
        """Whether another process will find what this one kept."""
        self._keeps_prompts = keeps_prompts
        self._reader = ImageReader(images, lambda *asked: thread.ask(database.names_image, *asked), thread.damage)
        self._unreadable: dict[str, DamagedJob] = {}
        """Jobs of earlier processes that did not end, and that nothing can read."""
        self._swept_at = time.monotonic()
        self._lost = images.lost()

    @classmethod
    async def open(
        cls,
        folder: Path | None,
        retention: JobRetention,
        *,
        keeps_prompts: bool = True,
        reserve_bytes: int = 0,
    ) -> JobStore:
        """Opens the store in a folder, or one in memory.

        Args:
            folder: where it lies; None for one in memory.
            retention: how long jobs that ended are kept.
            keeps_prompts: whether one on disk gets to see what prompts say.
            reserve_bytes: with less free on its disk, it takes no new job; see `require_room`.

        Raises:
            StoreUnusable: the folder cannot be used; the message says why and what to do.
        """
        thread = StoreThread()
        try:
            return await thread.run(partial(cls._open, folder, retention, thread, keeps_prompts, reserve_bytes))
        except BaseException:
            thread.end()
            raise

    @classmethod
    def _open(
        cls,
        folder: Path | None,
        retention: JobRetention,
        thread: StoreThread,
        keeps_prompts: bool,
        reserve_bytes: int,
    ) -> JobStore:
        if folder is None:
            memory = ImageMemory()
            return cls(Database(None, memory, retention), memory, thread, keeps_prompts=True)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder.parent)  # which has the folder's own name
            lock = StoreLock(folder)
            lock.acquire()
            images = ImageFolder(folder / "images")
            # SQLite gives its other files the mode of this one.
            os.close(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600))
            sync_folder(folder)
        except OSError as error:
            message = f"the job store {folder} cannot be used: {error.strerror}; see --data-dir and --store"
            raise StoreUnusable(message) from None
        try:
            database = Database(folder / FILE, images, retention)
        except BaseException:
            lock.release()
            raise
        room = DiskRoom(folder, reserve_bytes)
        return cls(database, images, thread, lock=lock, room=room, keeps_prompts=keeps_prompts)

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
        await self._thread.ask(self._database.insert, row)

    async def begin(self, job: Job) -> None:
        """Counts an attempt before it is made.

        Raises:
            StoreUnavailable: it cannot be counted.
        """
        started = 0 if job.started is None else records.microseconds(job.started)
        await self._thread.ask(self._database.begin, job.id, started)

    async def unbegin(self, job: Job) -> None:
        """Takes the count back.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.unbegin, job.id)

    async def note_adapters(self, job: Job, adapters: Iterable[KnownAdapter | None]) -> None:
        """Keeps what is known of a job's adapters by now.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.note_adapters, job.id, records.adapters_json(adapters))

    async def note_detached(self, job: Job) -> None:
        """Keeps that a job goes on without its callers.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.note_detached, job.id)

    async def note_cancelled(self, job: Job) -> None:
        """Keeps that a job is to be stopped, whichever process has it.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.note_cancelled, job.id)

    async def release_request_id(self, job: AnyJob) -> None:
        """Lets another job have the request id of one that ended.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.release_request_id, job.id)

    async def require_room(self, needed_bytes: int) -> None:
        """Checks that one more job may be taken, whose images and events need so much at most.

        Raises:
            DiskFull: it may not.
        """
        if self._room is not None:
            await asyncio.to_thread(self._room.require, needed_bytes, "another job")

    async def put_image(self, job: Job, header: ImageHeader, data: bytes) -> None:
        """Keeps an image of a job that runs.

        Raises:
            StoreUnavailable: it cannot.
        """
        await self._thread.ask(self._database.put_image, header.sha256, data, job.owner)

    async def finish(self, job: Job, ending: LoggedEvent) -> bool:
        """Keeps a job's end, its events and its images. Returns False where it had an end already.

        Raises:
            ImagesNotStored: it succeeded, and its images were not stored before.
            StoreUnavailable: it cannot.
        """
        return await self._thread.ask(
            self._finish, job.id, job.done_steps, job.log.headers, job.log.entries, ending
        )

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
            raise ImagesNotStored("its images could not be stored")
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

    async def take_over(self) -> tuple[list[Unfinished], bool]:
        """What earlier processes left to do, in the order of admission, but for what cannot be read; and whether
        this process is counted: if not, for want of room, nothing may run before `count_start`.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot be read.
        """
        found, is_counted = await self._thread.ask(self._database.take_over)
        readable = []
        for row in found:
            try:
                readable.append(stored_jobs.unfinished_job(row))
            except JobDamaged as error:
                self._thread.damage["row"] += 1
                self._unreadable[row["id"]] = stored_jobs.damaged_job(row, error)
        return readable, is_counted

    async def count_start(self) -> None:
        """Counts this process for each job that did not end.

        Raises:
            StoreUnavailable: there is no room yet.
        """
        await self._thread.ask(self._database.count_start)

    def age_s(self, unfinished: Unfinished) -> float:
        """How long ago a job was admitted, by the store's own time."""
        return max(0.0, self._database.time.now_s() - unfinished.admitted_kept_us / 1e6)

    async def ended(self, owner: str, job_id: str) -> EndedJob | None:
        """One of the owner's jobs that ended.

        Raises:
            JobDamaged: it cannot be read, whether it ended or not.
            StoreUnavailable, StoreDamaged: the store cannot be read.
        """
        unreadable = self._unreadable.get(job_id)
        if unreadable is not None and unreadable.owner == owner:
            raise unreadable.error
        row = await self._thread.ask(self._database.ended, owner, job_id)
        return None if row is None else self._ended(row)

    async def ended_by_request(self, owner: str, request_id: str) -> EndedJob | None:
        """The one that was made under a request id.

        Raises:
            JobDamaged: it cannot be read.
            StoreUnavailable, StoreDamaged: the store cannot be read.
        """
        for job in self._unreadable.values():
            if (job.owner, job.request_id) == (owner, request_id):
                raise job.error
        row = await self._thread.ask(self._database.ended_by_request, owner, request_id)
        return None if row is None else self._ended(row)

    async def request_of(self, owner: str, job_id: str) -> StoredRequest | None:
        """What one of the owner's jobs that ended was asked for.

        Raises:
            JobDamaged: it cannot be read.
            StoreUnavailable, StoreDamaged: the store cannot be read.
        """
        row = await self._thread.ask(self._database.ended, owner, job_id)
        return None if row is None else stored_jobs.stored_request(row)

    async def page(
        self,
        owner: str,
        limit: int,
        *,
        before: tuple[int, str] | None,
        since_us: int | None,
        states: Sequence[str] | None,
    ) -> list[EndedJob | DamagedJob]:
        """See `Database.page`.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot be read.
        """
        find = partial(self._database.page, before=before, since_us=since_us, states=states)
        return [self._listed(row) for row in await self._thread.ask(find, owner, limit)]

    def unreadable_jobs(self) -> Collection[DamagedJob]:
        """Those that did not end and cannot be read."""
        return self._unreadable.values()

    async def delete(self, job_id: str) -> bool:
        """Forgets a job that ended, or cannot be read. Returns whether there was one.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot.
        """
        is_unreadable = job_id in self._unreadable
        delete = partial(self._database.delete, although_not_ended=is_unreadable)
        is_gone = await self._thread.ask(delete, job_id)
        self._unreadable.pop(job_id, None)
        return is_gone

    async def tend(self) -> None:
        """Forgets what need not be kept longer, and whatever else is due every half minute.

        Raises:
            StoreUnavailable, StoreDamaged: it cannot.
        """
        await self._thread.ask(self._database.tend)
        self._swept_at = time.monotonic()
        self._lost = await asyncio.to_thread(self._images.lost)

    async def close(self) -> None:
        """Ends it, after everything that was asked before."""
        await self._thread.close(self._database.close)
        if self._lock is not None:
            self._lock.release()

    def facts(self) -> StoreFacts:
        """What is known of the store now; answers at once, on any thread."""
        free = None
        if self._room is not None:
            with suppress(OSError):
                free = self._room.free_bytes()
        lost_files, lost_bytes = self._lost
        return StoreFacts(
            free_bytes=free,
            reserve_bytes=0 if self._room is None else self._room.reserve_bytes,
            wal_bytes=self._database.log_bytes,
            failures=dict(self._thread.failures),
            damaged=dict(self._thread.damage),
            lost_files=lost_files,
            lost_bytes=lost_bytes,
            swept_s_ago=time.monotonic() - self._swept_at,
            clock_ahead_s=self._database.time.ahead_s,
            clock_steps=self._database.time.steps,
        )

    def _ended(self, row: AnyRow) -> EndedJob:
        try:
            return stored_jobs.ended_job(row, self._load, self._reader.open)
        except JobDamaged:
            self._thread.damage["row"] += 1
            raise

    def _listed(self, row: AnyRow) -> EndedJob | DamagedJob:
        try:
            return self._ended(row)
        except JobDamaged as error:
            return stored_jobs.damaged_job(row, error)

    async def _load(self, job_id: str, accepted: Accepted) -> tuple[StoredEvent, ...]:
        found = await self._thread.ask(self._database.events, job_id)
        if found is None:
            raise deleted()
        try:
            return stored_jobs.read_events(job_id, *found, accepted)
        except JobDamaged:
            self._thread.damage["row"] += 1
            raise
