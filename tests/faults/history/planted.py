"""The server as it is shipped, with one promise broken on purpose, so that the checker itself is checked.

Run as `PLANT=name python -m tests.faults.history.planted` with the server's own flags.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from chromarpc_server.__main__ import main
from chromarpc_server.domain.errors import JobNotFound
from chromarpc_server.domain.events import Completed
from chromarpc_server.jobs.attendance import Attendance
from chromarpc_server.jobs.log import JobLog
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.images import BLOCK_BYTES, CheckedImage, ImageFolder
from chromarpc_server.jobs.store.job_store import JobStore

MODULE = "tests.faults.history.planted"
VARIABLE = "PLANT"


@dataclass(frozen=True)
class Plant:
    """A planted fault, and how it is found."""

    put: Callable[[], None]
    rule: str
    """The rule that it breaks."""
    seed: int
    """Of a run that finds it."""
    faults: tuple[str, ...]
    """What has to happen beside it."""


def _lose_cancels() -> None:
    """Every second cancel is acknowledged, and neither stored nor done."""
    real, turn = Attendance.cancel_for_good, count()

    async def cancel_for_good(self: Attendance, job: Any, *, when_unattended: bool = False) -> None:
        if next(turn) % 2:
            await real(self, job, when_unattended=when_unattended)

    Attendance.cancel_for_good = cancel_for_good  # type: ignore[method-assign]


def _end_twice() -> None:
    """Every second success is told, and not stored: another process runs the job again."""
    finish, ended, turn, unstored = JobStore.finish, JobRegistry.ended, count(), set()

    async def finish_some(self: JobStore, job: Any, ending: Any) -> bool:
        if isinstance(ending.event, Completed) and next(turn) % 2:
            unstored.add(job.id)
            return True
        return await finish(self, job, ending)

    def keep_unstored(self: JobRegistry, job: Any) -> None:
        if job.id not in unstored:
            ended(self, job)

    JobStore.finish = finish_some  # type: ignore[method-assign]
    JobRegistry.ended = keep_unstored  # type: ignore[method-assign]


def _serve_flipped_bits() -> None:
    """Images are served as they lie on disk, whatever their hash."""

    def check(self: ImageFolder, sha256: str) -> CheckedImage:
        data = self._path(sha256).read_bytes()
        blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
        return CheckedImage(sha256, len(data), tuple(hashlib.sha256(block).digest() for block in blocks))

    ImageFolder.check = check  # type: ignore[method-assign]


def _show_to_others() -> None:
    """Jobs that have not ended are shown to whoever has their id."""

    async def get(self: JobRegistry, owner: str, job_id: str) -> Any:
        job = self._jobs.get(job_id) or await self._store.ended(owner, job_id)
        if job is None:
            raise JobNotFound("there is no such job, or it was deleted", field="job_id")
        return job

    JobRegistry.get = get  # type: ignore[method-assign]


def _revive() -> None:
    """A deletion is not stored: it hides the job for as long as the process lives."""
    hidden: set[str] = set()
    ended, by_request, page = JobStore.ended, JobStore.ended_by_request, JobStore.page

    async def delete(self: JobStore, job_id: str) -> bool:
        is_new = job_id not in hidden
        hidden.add(job_id)
        return is_new

    def shown(job: Any) -> Any:
        return None if job is None or job.id in hidden else job

    async def ended_shown(self: JobStore, owner: str, job_id: str) -> Any:
        return shown(await ended(self, owner, job_id))

    async def by_request_shown(self: JobStore, owner: str, request_id: str) -> Any:
        return shown(await by_request(self, owner, request_id))

    async def page_shown(self: JobStore, *arguments: Any, **selection: Any) -> Any:
        return [job for job in await page(self, *arguments, **selection) if shown(job)]

    JobStore.delete = delete  # type: ignore[method-assign]
    JobStore.ended = ended_shown  # type: ignore[method-assign]
    JobStore.ended_by_request = by_request_shown  # type: ignore[method-assign]
    JobStore.page = page_shown  # type: ignore[method-assign]


def _number_again() -> None:
    """A job that is taken over numbers its events from the beginning."""
    JobLog.skip_to = lambda self, sequence: None  # type: ignore[method-assign]


def _redraw_otherwise() -> None:
    """Jobs are drawn again with other seeds than those that were drawn."""
    request_of = JobStore.request_of

    async def with_other_seeds(self: JobStore, owner: str, job_id: str) -> Any:
        stored = await request_of(self, owner, job_id)
        if stored is None:
            return None
        prompts = tuple(replace(prompt, seed=prompt.seed + 1) for prompt in stored.plan.prompts)
        return replace(stored, plan=replace(stored.plan, prompts=prompts))

    JobStore.request_of = with_other_seeds  # type: ignore[method-assign]


PLANTS: Mapping[str, Plant] = {
    "lost_cancel": Plant(_lose_cancels, "cancel", seed=1, faults=()),
    "double_end": Plant(_end_twice, "one_end", seed=1, faults=("kill",)),
    "served_flipped_bit": Plant(_serve_flipped_bits, "bytes", seed=1, faults=("flip",)),
    "foreign_read": Plant(_show_to_others, "foreign", seed=1, faults=()),
    "revived_delete": Plant(_revive, "revived", seed=1, faults=("kill",)),
    "sequence_fall": Plant(_number_again, "sequence", seed=1, faults=("kill",)),
    "other_redraw": Plant(_redraw_otherwise, "plan", seed=1, faults=()),
}


if __name__ == "__main__":
    PLANTS[os.environ[VARIABLE]].put()
    main()
