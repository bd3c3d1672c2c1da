"""Many small jobs on one server, with cancels, watchers and deletions, and what they leave behind: nothing.

    python -m tests.faults.soak --jobs 20000        (make soak JOBS=20000)

Clients make jobs, some of them twice under the same request id, watch them, some from two places, stop some, read
images, delete some; the server forgets the rest soon. Memory, threads, descriptors, the WAL and what lies below
--data-dir are sampled. In the end:

- every job that was acknowledged was seen to end (lost: 0);
- no request made two jobs, no job had two ends, no event came twice (doubled: 0);
- each image has the bytes that its seed gave before, a stopped job is cancelled, a deleted one gone (wrong: 0);
- what was sampled is flat: the last quarter is as the second one, within the tolerance of each.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import chromarpc
from chromarpc import aio
from chromarpc.v1 import job_service_pb2
from tests.faults.processes import ServerProcess, server_process
from tests.tiny_checkpoint import write_tiny_checkpoint

State = job_service_pb2.JobState
CLIENTS = 12
"""At work at once: so many jobs wait or run."""
SEEDS = 500
OPTIONS: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
IMAGE_BYTES = 13_000
"""About so much is kept of one job."""


@dataclass(frozen=True)
class Sample:
    """What the server holds at one moment."""

    at_s: float
    jobs: int
    rss_mib: float
    threads: int
    descriptors: int
    wal_mib: float
    files: int
    disk_mib: float


@dataclass(frozen=True)
class Tolerance:
    """How much more the last quarter may have than the second one."""

    part: float
    and_more: float


FLAT = {
    "rss_mib": Tolerance(0.05, 8),
    "threads": Tolerance(0, 3),
    "descriptors": Tolerance(0, 6),
    "wal_mib": Tolerance(0.1, 1),
    "files": Tolerance(0.1, 20),
    "disk_mib": Tolerance(0.1, 2),
}


@dataclass
class Report:
    """What came of a run."""

    jobs: int = 0
    """Acknowledged."""
    succeeded: int = 0
    cancelled: int = 0
    deleted: int = 0
    repeated: int = 0
    """Requests that were made twice."""
    watched_twice: int = 0
    events: int = 0
    seconds: float = 0.0
    jobs_per_s: float = 0.0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    growing: list[str] = field(default_factory=list)
    """What is not flat."""
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.doubled or self.wrong or self.growing or self.problems)


def run(jobs: int, seed: int, folder: Path, *, sample_s: float) -> Report:
    """Does everything; the folder is left for looking at."""
    report = Report()
    data_dir = folder / "data"
    # Small enough that it is full before the second quarter begins.
    keep_bytes = min(200, max(20, jobs // 10)) * IMAGE_BYTES
    flags = ["--preload", "chroma-mini", "--job-keep-bytes", str(keep_bytes), "--log-level", "warning"]
    with server_process(write_smallest_checkpoint(folder / "checkpoint"), data_dir, *flags, threads=1) as server:
        asyncio.run(_Soak(server, data_dir, jobs, Random(seed), report).run(sample_s))
        if code := server.stop():
            report.problems.append(f"the server ended with {code}")
        if server.log:
            report.problems.append(f"the server had something to say: {server.log[:2000]}")
    report.growing = growing(report.samples)
    _check_files(data_dir / "jobs", report)
    return report


def write_smallest_checkpoint(folder: Path) -> Path:
    """The tiny one with one head in one layer of its text encoder, which takes most of a small job's time."""
    write_tiny_checkpoint(folder)
    weights = folder / "text_encoder_2" / "model.safetensors"
    config = folder / "text_encoder_2" / "config.json"
    sizes = json.loads(config.read_text())
    width = sizes["d_kv"]
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(weights).items():
        if name.startswith("encoder.block.") and not name.startswith("encoder.block.0."):
            continue
        if name.endswith(("Attention.q.weight", "Attention.k.weight", "Attention.v.weight")):
            kept[name] = tensor[:width].contiguous()
        elif name.endswith(("Attention.o.weight", "attention_bias.weight")):
            kept[name] = tensor[:, : width if name.endswith("o.weight") else 1].contiguous()
        else:
            kept[name] = tensor
    save_file(kept, weights)
    config.write_text(json.dumps({**sizes, "num_layers": 1, "num_heads": 1}))
    return folder


class _Soak:
    """The clients, and what they were told."""

    def __init__(self, server: ServerProcess, data_dir: Path, jobs: int, chance: Random, report: Report) -> None:
        self._server = server
        self._data_dir = data_dir
        self._left = jobs
        self._chance = chance
        self._report = report
        self._made: set[str] = set()
        self._images: dict[int, str] = {}
        """Hash of each seed's image, as it was first seen."""

    async def run(self, sample_s: float) -> None:
        """Makes all jobs; returns once the last has ended."""
        began = time.monotonic()
        sampling = asyncio.create_task(self._sample(began, sample_s))
        async with (
            aio.AsyncClient(self._server.target) as client,
            aio.AsyncClient(self._server.target) as other,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(CLIENTS):
                clients.create_task(self._work(client, other))
        sampling.cancel()
        self._report.seconds = round(time.monotonic() - began, 1)
        self._report.jobs_per_s = round(self._report.jobs / self._report.seconds, 1)

    async def _work(self, client: aio.AsyncClient, other: aio.AsyncClient) -> None:
        while self._left > 0:
            self._left -= 1
            try:
                await self._one(client, other)
            except chromarpc.StatusError as error:
                self._report.problems.append(f"{type(error).__name__}: {error}")

    async def _one(self, client: aio.AsyncClient, other: aio.AsyncClient) -> None:
        chance, report = self._chance, self._report
        seed, request_id = chance.randrange(SEEDS), str(uuid.UUID(int=chance.getrandbits(128), version=4))
        job = await client.create_job("a", seed=seed, request_id=request_id, **OPTIONS)
        report.jobs += 1
        if job.job_id in self._made:
            self._wrong("doubled", f"two requests made the job {job.job_id}")
        self._made.add(job.job_id)
        if chance.random() < 0.1:
            report.repeated += 1
            again = await other.create_job("a", seed=seed, request_id=request_id, **OPTIONS)
            if again.job_id != job.job_id:
                self._wrong("doubled", f"the request of {job.job_id} made {again.job_id} too")
        watching = [asyncio.create_task(self._watch(client, job.job_id))]
        if chance.random() < 0.2:
            report.watched_twice += 1
            watching.append(asyncio.create_task(self._watch(other, job.job_id)))
        was_stopped = chance.random() < 0.2 and await self._stop(client, job.job_id)
        ends = await asyncio.gather(*watching)
        if len(set(ends)) > 1:
            self._wrong("doubled", f"the job {job.job_id} has two ends: {ends}")
        end = ends[0]
        if end == "CANCELLED":
            report.cancelled += 1
        elif end != "SUCCEEDED":
            self._wrong("lost", f"the job {job.job_id} did not end as it should: {end}")
        else:
            report.succeeded += 1
            if was_stopped:
                self._wrong("wrong", f"the job {job.job_id} ended well although its cancellation was acknowledged")
            await self._look(client, job.job_id, seed)
        if chance.random() < 0.25:
            await self._delete(client, job.job_id)

    async def _watch(self, client: aio.AsyncClient, job_id: str) -> str:
        """How it ends."""
        last, end = 0, "NOT_ENDED"
        try:
            async for event in client.watch_job(job_id):
                self._report.events += 1
                if event.sequence <= last or end != "NOT_ENDED":
                    self._wrong("doubled", f"an event of {job_id} came after {last}, or after its end")
                last = event.sequence
                if isinstance(event, chromarpc.Completed):
                    end = "SUCCEEDED"
        except chromarpc.StatusError as error:
            return error.reason or str(error)
        return end

    async def _stop(self, client: aio.AsyncClient, job_id: str) -> bool:
        """Returns whether the cancellation was acknowledged before the job's end."""
        await asyncio.sleep(self._chance.choice((0, 0, 0.05, 0.3)))
        return (await client.cancel_job(job_id)).state != State.JOB_STATE_SUCCEEDED

    async def _look(self, client: aio.AsyncClient, job_id: str, seed: int) -> None:
        found = hashlib.sha256(await client.get_image_bytes(job_id)).hexdigest()
        if self._images.setdefault(seed, found) != found:
            self._wrong("wrong", f"the job {job_id} has another image than the seed {seed} gave before")

    async def _delete(self, client: aio.AsyncClient, job_id: str) -> None:
        await client.delete_job(job_id)
        self._report.deleted += 1
        try:
            await client.get_job(job_id)
        except chromarpc.NotFound:
            return
        self._wrong("wrong", f"the job {job_id} is there although it was deleted")

    def _wrong(self, kind: str, problem: str) -> None:
        setattr(self._report, kind, getattr(self._report, kind) + 1)
        if len(self._report.problems) < 20:
            self._report.problems.append(problem)

    async def _sample(self, began: float, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            held = await asyncio.to_thread(_held, self._server.process.pid, self._data_dir)
            self._report.samples.append(Sample(round(time.monotonic() - began, 1), self._report.jobs, **held))


def _held(pid: int, data_dir: Path) -> dict[str, Any]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines() if ":" in line
    )
    sizes = dict(_files(data_dir))
    wal = sizes.get(str(data_dir / "jobs" / "jobs.sqlite3-wal"), 0)
    return {
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - links that lead to no file
        "wal_mib": round(wal / 2**20, 2),
        "files": len(sizes),
        "disk_mib": round(sum(sizes.values()) / 2**20, 2),
    }


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield str(path), path.stat().st_size
        except FileNotFoundError:
            pass  # went away meanwhile


def growing(samples: Sequence[Sample]) -> list[str]:
    """What the last quarter of the samples has more of than the second quarter, beyond its tolerance."""
    quarter = len(samples) // 4
    if quarter < 2:
        return [f"{len(samples)} samples are too few to tell"]
    found = []
    for name, tolerance in FLAT.items():
        values = [getattr(sample, name) for sample in samples]
        before, after = median(values[quarter : 2 * quarter]), median(values[-quarter:])
        if after > before * (1 + tolerance.part) + tolerance.and_more:
            found.append(f"{name}: {before:g} in the second quarter, {after:g} in the last")
    return found


def _check_files(folder: Path, report: Report) -> None:
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as database:
        if database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            report.problems.append("the database is damaged")
        left = database.execute("SELECT COUNT(*) FROM jobs WHERE ended_us IS NULL").fetchone()[0]
        named = {row[0] for row in database.execute("SELECT sha256 FROM images")}
    files = {path.name for path in (folder / "images").rglob("*") if path.is_file()}
    if left:
        report.problems.append(f"{left} jobs did not end")
    if named != files:
        report.problems.append(f"{len(named ^ files)} images are not named, or not there")


def table(samples: Sequence[Sample], lines: int = 24) -> str:
    """The samples, evenly thinned out."""
    names = list(Sample.__dataclass_fields__)
    step = max(1, -(-len(samples) // lines))
    rows = [names, *([str(getattr(sample, name)) for name in names] for sample in samples[::step])]
    return "\n".join(" ".join(f"{cell:>11}" for cell in row) for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-s", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="also write the report there, with every sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.jobs, options.seed, Path(folder), sample_s=options.sample_s)
    print(table(report.samples))
    told = asdict(report)
    samples = told.pop("samples")
    print(json.dumps(told, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps({**told, "samples": samples}, indent=2) + "\n")
    raise SystemExit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
