"""Starts on a disk that a cut left, and judges what it finds there by what was acknowledged."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.domain.events import ImageChunk
from chromarpc_server.jobs.job import EndedJob
from chromarpc_server.jobs.store.images import OWNER_ATTRIBUTE
from chromarpc_server.jobs.store.stored_jobs import Unfinished
from tests.faults.cuts.promises import PromisedJob, Promises
from tests.faults.cuts.scenario import ACKNOWLEDGED, FOUND, KEEP_JOBS, OWNERS, Parts, digest, opened

STRANGERS = ("carol", "")
"""Callers who never sent anything; the last one is that of a server that does not ask who calls."""
_CHANGED_BY_STARTS = ("starts",)
_NO_CONTENT = ("jobs.sqlite3", "jobs.sqlite3-wal", "jobs.sqlite3-shm", "lock", "ballast", ACKNOWLEDGED)


@dataclass
class Verdict:
    """What was found wrong."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """A kind, for counting, and what it is in this case."""

    def require(self, holds: object, kind: str, detail: str) -> None:
        """Notes a problem unless it holds."""
        if not holds:
            self.problems.append((kind, detail))


@dataclass(frozen=True)
class _Rows:
    """What the database says, read beside the server or without one."""

    jobs: list[dict[str, object]]
    named: frozenset[str]
    intended: frozenset[str]
    """Images that a start may remove."""


async def judge(folder: Path, promises: Promises, beside: Path) -> Verdict:
    """Starts twice.

    Args:
        folder: what a cut left.
        promises: what was acknowledged before.
        beside: an empty folder to work in; left empty.
    """
    verdict = Verdict()
    rows_before, images_before = _rows(folder, beside), _images(folder)
    try:
        async with opened(folder) as parts:
            await _judge_parts(parts, promises, verdict)
        first = _Left.of(folder, beside)
        _judge_files(folder, promises, verdict, first.rows)
        _judge_removed(rows_before, images_before, first.images, verdict)
        async with opened(folder) as parts:
            await parts.store.take_over()
        second = _Left.of(folder, beside)
    except Exception as error:  # noqa: BLE001 - a start that fails is what is looked for
        verdict.require(False, "start failed", f"{type(error).__name__}: {error}")
        return verdict
    verdict.require(first.same(second), "second start changed", first.difference(second))
    return verdict


async def _judge_parts(parts: Parts, promises: Promises, verdict: Verdict) -> None:
    unfinished = {job.id: job for job in (await parts.store.take_over())[0]}
    for promise in promises.jobs.values():
        callers = (promise.owner, *({*OWNERS, *STRANGERS} - {promise.owner}))
        ended, *others = await asyncio.gather(*(parts.store.ended(caller, promise.id) for caller in callers))
        verdict.require(not any(others), "foreign job", promise.name)
        _judge_job(promise, unfinished.get(promise.id), ended, verdict)
        if ended is not None:
            await _judge_ended(promise, ended, parts, verdict)
    for job_id in unfinished.keys() - promises.jobs.keys():
        verdict.require(False, "unknown job", job_id)
    verdict.require(parts.store.size.jobs <= KEEP_JOBS, "not forgotten", f"{parts.store.size.jobs} jobs")
    _judge_adapters(parts.uploads.store, promises, verdict)


def _judge_job(
    promise: PromisedJob, unfinished: Unfinished | None, ended: EndedJob | None, verdict: Verdict
) -> None:
    name = promise.name
    is_there = unfinished is not None or ended is not None
    verdict.require(promise.is_kept in (is_there, None), "job lost" if promise.is_kept else "job revived", name)
    if not is_there:
        return
    verdict.require(unfinished is None or ended is None, "job doubled", name)
    verdict.require(promise.has_ended in (ended is not None, None), "end lost or made up", name)
    attempts = (unfinished or ended).attempts  # type: ignore[union-attr]
    verdict.require(promise.attempts <= attempts <= promise.attempts + promise.begins, "attempts miscounted", name)
    if unfinished is not None:
        verdict.require(promise.is_cancelled in (unfinished.is_cancelled, None), "cancel lost or made up", name)
        verdict.require(unfinished.owner == promise.owner, "owner changed", name)
        verdict.require(promise.prompt in (unfinished.plan.prompts[0].prompt, None), "plan changed", name)
        verdict.require(unfinished.plan.request_id == promise.request_id, "request id changed", name)


async def _judge_ended(promise: PromisedJob, ended: EndedJob, parts: Parts, verdict: Verdict) -> None:
    name = promise.name
    verdict.require(ended.log.ending.sequence == promise.sequence, "another end", name)
    verdict.require({header.sha256 for header in ended.log.headers} == set(promise.images), "images changed", name)
    pieces: dict[int, bytes] = {}
    try:
        async for entry in ended.log.follow():
            if entry is not None and isinstance(entry.event, ImageChunk):
                chunk = entry.event
                pieces[chunk.prompt_index] = pieces.get(chunk.prompt_index, b"") + chunk.data
    except Exception as error:  # noqa: BLE001 - whatever it is, an image is not to be had
        verdict.require(False, "image missing", f"{name}: {error}")
        return
    for header in ended.log.headers:
        data = pieces.get(header.prompt_index, b"")
        verdict.require(digest(data) == header.sha256, "image damaged", f"{name}: {header.sha256[:8]}")
    if promise.request_id is not None and promise.is_released is not None:
        found = await parts.store.ended_by_request(promise.owner, promise.request_id)
        is_held = found is not None and found.id == promise.id
        verdict.require(is_held is not promise.is_released, "request id lost or not released", name)


def _judge_adapters(store: ContentStore, promises: Promises, verdict: Verdict) -> None:
    for sha256 in promises.adapters:
        for owner in (*OWNERS, *STRANGERS):
            owns = promises.owns(sha256, owner)
            file, listed = store.locate(sha256, owner), store.find(sha256, owner)
            detail = f"{sha256[:8]} of {owner or 'nobody'}"
            verdict.require((file is None) == (listed is None), "adapter half there", detail)
            if owns is not None:
                verdict.require(owns == (file is not None), "adapter lost" if owns else "foreign adapter", detail)
            if file is not None:
                verdict.require(digest(file.path.read_bytes()) == sha256, "adapter damaged", detail)


def _judge_files(folder: Path, promises: Promises, verdict: Verdict, rows: _Rows) -> None:
    """What lies there after a start and a stop."""
    images = _images(folder)
    for sha256 in rows.named:
        verdict.require(images.get(sha256) == sha256, "image of a row missing or damaged", sha256[:8])
    for job in promises.jobs.values():
        if job.prompt and job.is_kept and job.has_ended:
            for sha256 in job.images:
                noted = _owners_noted(folder / "jobs" / "images" / sha256[:2] / sha256)
                verdict.require(noted is None or job.owner in noted, "image without its owner", sha256[:8])
    kept = {image for job in promises.jobs.values() if job.is_kept is not False for image in job.images}
    deleted = {image for job in promises.jobs.values() for image in job.images} - kept
    for sha256 in images.keys() - rows.named - {digest(FOUND)}:
        kind = "deleted image left" if sha256 in deleted else "unfinished job's image left"
        verdict.require(False, kind, sha256[:8])
    gone = {job.prompt.encode(): job.name for job in promises.jobs.values() if job.prompt and job.is_kept is False}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != "ballast"):
        data = path.read_bytes()
        for text, name in gone.items():
            verdict.require(text not in data, "deleted prompt left", f"{name} in {path.name}")


def _judge_removed(before: _Rows, images_before: dict[str, str], after: dict[str, str], verdict: Verdict) -> None:
    """A start removes what is named in `image_intents`, what it forgets itself, and nothing else."""
    for sha256 in images_before.keys() - after.keys() - before.intended - before.named:
        what = "a found image" if sha256 == digest(FOUND) else "an image of a job that did not end"
        verdict.require(False, "unnamed image deleted", f"{what}: {sha256[:8]}")


@dataclass(frozen=True)
class _Left:
    """What a start and a stop leave."""

    rows: _Rows
    images: dict[str, str]
    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path, beside: Path) -> _Left:
        files = {
            str(path.relative_to(folder)): _digest_of(path)
            for path in folder.rglob("*")
            if path.is_file() and path.name not in _NO_CONTENT
        }
        return cls(_rows(folder, beside), _images(folder), files)

    def same(self, other: _Left) -> bool:
        return self == other

    def difference(self, other: _Left) -> str:
        if self.files != other.files:
            return f"files: {sorted(dict(self.files.items() ^ other.files.items()))}"
        return f"rows: {self.rows} {other.rows}" if self.rows != other.rows else ""


def _images(folder: Path) -> dict[str, str]:
    """Files of images, wherever they lie, by name; each with the hash of its bytes."""
    return {
        path.name: _digest_of(path)
        for path in (folder / "jobs" / "images").rglob("*")
        if path.is_file() and len(path.name) == 64
    }


def _owners_noted(path: Path) -> list[str] | None:
    """Whom an image was drawn for, as `store forget` will ask; None where the file system keeps no such notes."""
    try:
        return os.getxattr(path, OWNER_ATTRIBUTE).decode().split("\n")
    except OSError as error:
        return None if error.errno == errno.ENOTSUP else []


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(folder: Path, beside: Path) -> _Rows:
    """Reads a copy of the database, so that nothing is recovered in the original."""
    copied = beside / "jobs.sqlite3"
    try:
        for path in (folder / "jobs").glob("jobs.sqlite3*"):
            shutil.copyfile(path, beside / path.name)
        with closing(sqlite3.connect(copied)) as database:
            database.row_factory = sqlite3.Row
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return _Rows(
                [
                    {name: row[name] for name in row.keys() if name not in _CHANGED_BY_STARTS}  # noqa: SIM118
                    for row in (database.execute("SELECT * FROM jobs ORDER BY number") if "jobs" in tables else ())
                ],
                frozenset(_column(database, "images") if "images" in tables else ()),
                frozenset(_column(database, "image_intents") if "image_intents" in tables else ()),
            )
    except sqlite3.DatabaseError:
        return _Rows([], frozenset(), frozenset())
    finally:
        for path in beside.iterdir():
            path.unlink()


def _column(database: sqlite3.Connection, table: str) -> Iterator[str]:
    return (row[0] for row in database.execute(f"SELECT DISTINCT sha256 FROM {table}"))  # noqa: S608 - ours
