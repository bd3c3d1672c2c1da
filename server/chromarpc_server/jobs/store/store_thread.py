"""The thread that everything asked of the store is done on, in the order it was asked; its failures in words."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from chromarpc_server.domain.errors import (
    DiskFull,
    Draining,
    ImageDamaged,
    JobNotFound,
    StoreDamaged,
    StoreUnavailable,
)
from chromarpc_server.domain.events import ImageHeader
from chromarpc_server.jobs.log import StoredImage
from chromarpc_server.jobs.store.images import DamagedImage, Images
from chromarpc_server.jobs.store.sqlite_file import is_damage, is_out_of_room

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ImagesNotStored(Exception):
    """A job did all it was to do, and its images are not stored."""


class StoreThread:
    """One thread, and what went wrong on it. `ask` belongs to the event loop, the counts to anybody."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._closed = False
        self.failures: Counter[str] = Counter()
        """By what was asked."""
        self.damage: Counter[str] = Counter()
        """That was met: `image`, `row`, `database`."""

    async def run(self, call: Callable[[], _T]) -> _T:
        """Does it on the thread, and lets every error through."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def ask(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Does it on the thread.

        Raises:
            Draining: the store is closed.
            StoreUnavailable: it fails now, and may not later.
            StoreDamaged: the database is damaged; asking again does not help.
            DiskFull: there is no room for a new job.
        """
        if self._closed:
            raise Draining("the server is stopping", retry_after_s=RETRY_AFTER_S)
        try:
            return await self.run(partial(call, *args, **kwargs))
        except (sqlite3.Error, OSError) as error:
            raise self._failed(_name(call), error) from None

    async def close(self, last: Callable[[], None]) -> None:
        """Does one last thing, after everything that was asked before."""
        self._closed = True
        await self.run(last)
        self.end()

    def end(self) -> None:
        """Lets the thread end."""
        self._executor.shutdown(wait=False)

    def _failed(self, call: str, error: Exception) -> StoreUnavailable | StoreDamaged | DiskFull:
        # Never the statement's values: prompts are among them.
        log.error("store.failed", extra={"call": call, "error": str(error)})
        self.failures[call] += 1
        if is_damage(error):
            self.damage["database"] += 1
            return StoreDamaged("the server's database is damaged; its operator has to repair it")
        if call == "insert" and is_out_of_room(error):
            return DiskFull(
                "the server's disk has no room for another job: delete jobs or uploads that you need no longer, "
                "or ask its operator for room",
                retry_after_s=RETRY_AFTER_S,
            )
        message = "the server cannot reach its job store now; it is out of room or fails"
        return StoreUnavailable(message, retry_after_s=RETRY_AFTER_S)


class ImageReader:
    """Opens images of jobs that ended: each is read whole, and found good, before any of it is handed out."""

    def __init__(
        self, images: Images, names_image: Callable[[str, str], Awaitable[bool]], damage: Counter[str]
    ) -> None:
        """Touches nothing.

        Args:
            images: the images.
            names_image: whether the job with an id is there and has the image with a hash.
            damage: where damage is counted.
        """
        self._images = images
        self._names_image = names_image
        self._damage = damage

    async def open(self, job_id: str, header: ImageHeader) -> StoredImage:
        """An image of a job.

        Raises:
            ImageDamaged: it is not there, or not good; reading it raises that too.
            JobNotFound: the job was deleted meanwhile.
        """
        checked = await self._touch(job_id, header, partial(self._images.check, header.sha256))

        async def read(offset: int, size: int) -> bytes:
            return await self._touch(job_id, header, partial(self._images.read, checked, offset, size))

        return read

    async def _touch(self, job_id: str, header: ImageHeader, call: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(call)
        except DamagedImage as error:
            if not await self._names_image(job_id, header.sha256):
                raise deleted() from None
            self._damage["image"] += 1
            fields = {"job_id": job_id, "sha256": header.sha256, "problem": str(error)}
            log.error("store.image_damaged", extra=fields)  # noqa: TRY400 - no traceback wanted
            raise ImageDamaged(
                f"the stored image of prompt {header.prompt_index} is damaged: {error}; RedrawJob draws it again",
                field="prompt_index",
                metadata={"job_id": job_id, "prompt_index": str(header.prompt_index)},
            ) from None


def deleted() -> JobNotFound:
    """For a reader whose job went away."""
    return JobNotFound("the job was deleted meanwhile", field="job_id")


def _name(call: Callable[..., object]) -> str:
    """What is asked: a method's name."""
    inner = call.func if isinstance(call, partial) else call
    return str(getattr(inner, "__name__", "call"))
