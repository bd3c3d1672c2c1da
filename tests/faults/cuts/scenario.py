"""What the store does in a day, in a minute: run under the recorder, without a server.

    python -m tests.faults.cuts.scenario FOLDER ACT

Plays one act in a process of its own, over the same folder: the process of the first one ends without closing
anything. Before and after each step a line goes to the file `acknowledged`: what is attempted, and that it was
acknowledged. The judge knows nothing but these lines.

The only module here that knows how the store is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from chromarpc_server.adapters.downloads.cache import DownloadCache
from chromarpc_server.adapters.uploads.registry import UploadRegistry
from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import JobCancelled
from chromarpc_server.domain.events import (
    Accepted,
    Cancelled,
    Completed,
    ImageChunk,
    ImageHeader,
    Terminal,
    Timings,
)
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.domain.plan import Plan, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.runtime.cancellation import Cancellation
from tests.adapters.libraries import open_library

ACKNOWLEDGED = "acknowledged"
KEEP_JOBS = 4
RETENTION = JobRetention(keep_s=1e8, keep_jobs=KEEP_JOBS)
OWNERS = ("alice", "bob")
FOUND = b"an image of a database that is gone"
"""Lies among the images before the first start; no row will ever name it."""
OLD_STORE = Path(__file__).parents[2] / "jobs" / "store" / "store_0_1_0"
Line = dict[str, Any]
"""Of the file `acknowledged`."""
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Parts:
    """What a server has open."""

    store: JobStore
    uploads: UploadRegistry


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Parts]:
    """What a start opens below --data-dir, in its order; closed in good order."""
    store = await JobStore.open(folder / "jobs", RETENTION)
    try:
        library = open_library(None, folder)
        library.remove_abandoned()
        yield Parts(store, library.uploads)
    finally:
        await store.close()


def leave_image(folder: Path) -> list[Line]:
    """An image lies there that no job names. Returns what is promised then: nothing."""
    sha256 = digest(FOUND)
    path = folder / "jobs" / "images" / sha256[:2] / sha256
    path.parent.mkdir(parents=True)
    path.write_bytes(FOUND)
    return []


def leave_old_store(folder: Path) -> list[Line]:
    """What version 0.1.0 left, some of it; its schema is an earlier one. Returns what is promised of its jobs."""
    shutil.copytree(OLD_STORE, folder / "jobs", ignore=shutil.ignore_patterns("expected.json"))
    with closing(sqlite3.connect(folder / "jobs" / "jobs.sqlite3", isolation_level=None)) as database:
        few = "('succeeded', 'ended-cancelled', 'ended-internal')"
        database.execute(f"DELETE FROM jobs WHERE ended_us IS NOT NULL AND id NOT IN {few}")  # noqa: S608
        database.execute("UPDATE jobs SET owner = ?", OWNERS[:1])
        database.row_factory = sqlite3.Row
        return [
            {
                "does": "find",
                "done": True,
                "job": row["id"],
                "owner": row["owner"],
                "request_id": row["request_id"],
                "ended": row["ended_us"] is not None,
                "cancelled": bool(row["cancelled"]),
                "attempts": row["attempts"],
                "images": [header["sha256"] for header in json.loads(row["headers"] or "[]")],
                "sequence": json.loads(row["ending"] or "[0]")[0],
            }
            for row in database.execute("SELECT * FROM jobs ORDER BY number")
        ]


def digest(data: bytes) -> str:
    """Its SHA-256."""
    return hashlib.sha256(data).hexdigest()


def image_bytes(name: str) -> bytes:
    """An image of 1.5 KiB; the same name, the same bytes."""
    return hashlib.shake_256(name.encode()).digest(1500)


def adapter_bytes(name: str) -> bytes:
    """A small adapter file."""
    key = "diffusion_model.img_in.lora_{}.weight"
    tensors = {
        key.format("A"): {"dtype": "F32", "shape": [2, 64], "data_offsets": [0, 512]},
        key.format("B"): {"dtype": "F32", "shape": [64, 2], "data_offsets": [512, 1024]},
    }
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + bytes(512) + name.encode().ljust(512, b"\0")


def secret(name: str) -> str:
    """What the prompt of a job says; nothing else says it."""
    return f"what {name} wanted to see {digest(name.encode())}"


class Player:
    """Takes steps, and writes down what was acknowledged."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        self._parts = parts
        self._marks = os.open(folder / ACKNOWLEDGED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._jobs: dict[str, Job] = {}

    @contextlib.contextmanager
    def step(self, does: str, **what: object) -> Iterator[None]:
        """A step that is acknowledged once it returns."""
        self._mark(does, False, what)
        yield
        self._mark(does, True, what)

    def _mark(self, does: str, done: bool, what: dict[str, object]) -> None:
        os.write(self._marks, json.dumps({"does": does, "done": done, **what}).encode() + b"\n")

    async def insert(self, name: str, request_id: str | None = None) -> None:
        """Admits a job; the first letter of its name says whose it is."""
        owner = next(owner for owner in OWNERS if owner[0] == name[0])
        job = Job(
            plan=_plan(name, request_id),
            adapter_files=(),
            cancellation=Cancellation(),
            owner=owner,
            id=digest(name.encode())[:32],
            fingerprint=f"2:{digest(name.encode())}",
            created=_BEGAN + timedelta(seconds=len(self._jobs)),
        )
        job.log.append(Accepted(job.id, job.plan))
        self._jobs[name] = job
        with self.step("insert", job=job.id, name=name, owner=owner, request_id=request_id):
            await self._parts.store.insert(job, needs_token=False, adapters=())

    async def begin(self, name: str) -> None:
        """Begins to run it."""
        job = self._jobs[name]
        job.started = _BEGAN + timedelta(minutes=1)
        with self.step("begin", job=job.id):
            await self._parts.store.begin(job)

    async def put(self, name: str, *images: str) -> None:
        """Keeps images of a job that runs."""
        job = self._jobs[name]
        for image in images:
            data = image_bytes(image)
            header = ImageHeader(len(job.log.headers), "image/png", len(data), 64, 64, digest(data), 1)
            job.log.append(header)
            job.log.append(ImageChunk(header.prompt_index, 0, data))
            with self.step("put", job=job.id, image=header.sha256):
                await self._parts.store.put_image(job, header, data)

    async def finish(self, name: str, event: Terminal | None = None) -> None:
        """Ends it."""
        job = self._jobs[name]
        ending = job.log.seal(event or Completed(Timings(), 0, len(job.log.headers)))
        images = [header.sha256 for header in job.log.headers]
        with self.step("finish", job=job.id, images=images, sequence=ending.sequence):
            assert await self._parts.store.finish(job, ending)

    async def run(self, name: str, *images: str) -> None:
        """A job from its admission to its end."""
        await self.insert(name)
        await self.begin(name)
        await self.put(name, *images)
        await self.finish(name)

    async def cancel(self, name: str) -> None:
        """Acknowledges that it will be stopped."""
        job = self._jobs[name]
        with self.step("cancel", job=job.id):
            await self._parts.store.note_cancelled(job)

    async def release(self, name: str) -> None:
        """Lets another job have its request id."""
        job = self._jobs[name]
        with self.step("release", job=job.id):
            await self._parts.store.release_request_id(job)

    async def delete(self, name: str) -> None:
        """Deletes one that ended."""
        job = self._jobs[name]
        with self.step("delete", job=job.id):
            assert await self._parts.store.delete(job.id)

    async def tend(self) -> None:
        """What the engine does every half minute."""
        await self._parts.store.tend()

    async def take_over(self) -> None:
        """Goes on with what an earlier process left."""
        unfinished, _ = await self._parts.store.take_over()
        names = {digest(name.encode())[:32]: name for name in ("a3", "a4")}
        for stored in unfinished:
            job = Job(stored.plan, (), Cancellation(), stored.owner, stored.id, attempts=stored.attempts)
            job.log.append(Accepted(job.id, job.plan))
            job.log.skip_to(stored.starts * 2**20)
            self._jobs[names[job.id]] = job

    def upload(self, owner: str, name: str) -> None:
        """Uploads an adapter whole."""
        data = adapter_bytes(name)
        state = self._parts.uploads.create(f"{name}.safetensors", len(data), caller=Caller(owner))
        for offset in range(0, len(data), 1000):
            self._parts.uploads.append(state.upload_id, offset, data[offset : offset + 1000], owner)
        with self.step("own", sha256=digest(data), owner=owner):
            self._parts.uploads.finalize(state.upload_id, digest(data), owner)

    def fetch(self, owner: str, name: str) -> None:
        """Takes an adapter as a download does: nobody's until it is there."""
        store, data = self._parts.uploads.store, adapter_bytes(name)
        with self.step("own", sha256=digest(data), owner=owner):
            cache = DownloadCache(store, max_bytes=2**30)
            with cache.part_file() as part:
                part.write(data)
                part.sync()
                cache.add(part)
            store.add_owner(digest(data), owner)

    def share(self, owner: str, name: str) -> None:
        """Gives an adapter that is there to one more owner, as a download of the same bytes does."""
        sha256 = digest(adapter_bytes(name))
        with self.step("own", sha256=sha256, owner=owner):
            self._parts.uploads.store.add_owner(sha256, owner)

    def leave(self, owner: str, name: str) -> None:
        """Takes an adapter from one of its owners."""
        sha256 = digest(adapter_bytes(name))
        with self.step("disown", sha256=sha256, owner=owner):
            assert self._parts.uploads.store.remove_owner(sha256, owner)


async def first_act(play: Player) -> None:
    """Jobs and uploads come and go; the process is lost while a job runs."""
    await play.insert("a1", request_id="r1")
    await play.begin("a1")
    await play.put("a1", "sunrise")
    await play.finish("a1")
    play.upload("alice", "style")
    await play.insert("a2")
    await play.insert("b1", request_id="r1")
    await play.cancel("b1")
    await play.finish("b1", Cancelled(JobCancelled("the job was cancelled")))
    await play.begin("a2")
    await play.put("a2", "sunrise", "sunset")
    await play.finish("a2")
    play.upload("bob", "style")
    play.upload("bob", "face")
    play.share("alice", "face")
    play.fetch("alice", "pose")
    play.share("bob", "pose")
    await play.release("a1")
    await play.insert("a3", request_id="r1")
    await play.delete("a1")  # its image is the other job's too
    await play.insert("b2")
    await play.begin("b2")
    await play.put("b2", "sunset")
    await play.delete("a2")  # one of its images waits for the end of another job, too
    await play.finish("b2")
    await play.run("b3", "sunrise")  # comes again after it went
    play.leave("alice", "style")
    await play.cancel("a3")
    await play.insert("a4")
    await play.begin("a4")
    await play.put("a4", "noon")


async def second_act(play: Player) -> None:
    """What was left is run again; so many jobs end that the oldest are forgotten; everything is closed."""
    await play.take_over()
    await play.finish("a3", Cancelled(JobCancelled("the job was cancelled")))
    await play.begin("a4")
    await play.put("a4", "noon", "night")
    await play.finish("a4")
    play.upload("alice", "hands")
    play.leave("alice", "hands")  # its last owner
    for number in range(3):
        await play.run(f"b{number + 4}", f"flower {number}", "vase")
    await play.tend()
    await play.delete("b5")
    await play.insert("b7")
    play.leave("alice", "pose")
    play.leave("bob", "face")
    play.leave("bob", "style")


async def old_act(play: Player) -> None:
    """A store of an earlier version is gone on with."""
    await play.run("a1", "sunrise")
    await play.insert("b1")


async def fresh_act(play: Player) -> None:
    """The first things that happen below a new --data-dir."""
    await play.run("a1", "sunrise")
    play.upload("alice", "style")


ACTS = {"first": first_act, "second": second_act, "fresh": fresh_act, "old": old_act, "start": None}


async def perform(folder: Path, act: str) -> None:
    """Plays an act; `start` only starts, and stops."""
    async with opened(folder) as parts:
        play = ACTS[act]
        if play is None:
            await parts.store.take_over()
            return
        await play(Player(folder, parts))
        if act == "first":
            os._exit(0)


def _plan(name: str, request_id: str | None) -> Plan:
    prompt = PlannedPrompt(secret(name), width=64, height=64, sample_steps=1, guidance_scale=1.0, seed=1)
    return Plan(
        model="chroma-mini",
        served_model="chroma-mini",
        profile="reference",
        noise_draw=next(iter(NoiseDraw)),
        prompts=(prompt, dataclasses.replace(prompt, seed=2)),
        loras=(),
        output=PlannedOutput(format=ImageFormat.PNG, quality=100),
        preview=None,
        warnings=(),
        request_id=request_id,
        detached=True,
    )


if __name__ == "__main__":
    asyncio.run(perform(Path(sys.argv[1]), sys.argv[2]))
