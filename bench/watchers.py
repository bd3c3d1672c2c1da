"""Many watchers of running jobs, many new jobs, cuts and idleness: `python -m bench.watchers [--out FILE]`.

A real server of chroma-mini on two CPU cores; watchers in processes of their own, on other cores where there are
any. Latency is from an event's own time, which the server stamps when it happens, to the moment a watcher has
parsed it; both clocks are the same machine's. Step times without watchers are taken before and after those with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from bench.machine import commit
from bench.server_process import ServerProcess, started
from chromarpc import Client
from chromarpc.v1 import generation_service_pb2, job_service_pb2, job_service_pb2_grpc

PER_PROCESS = 125
"""Watchers in one process."""
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 * 2**20)]


@dataclass(frozen=True)
class Work:
    """What is drawn while others watch."""

    model: str
    side: int
    steps: int


@dataclass(frozen=True)
class Watched:
    """What so many watchers saw of running jobs."""

    watchers: int
    jobs: int
    events: int
    """Delivered, to all together."""
    complete: int
    """Watchers that saw every event of their job, in order."""
    p50_ms: float
    p99_ms: float
    worst_ms: float
    step_ms: float
    """Median of the jobs' own step times."""
    slowdown: float
    """To the step time with no watchers."""
    rss_growth_mb: float
    server_cpu: float
    """CPU seconds a second, of which about one is the pipeline's."""


@dataclass(frozen=True)
class Created:
    """What came of many calls of `CreateJob`."""

    calls: int
    accepted: int
    refused_full: int
    other: int
    listed: int
    """Jobs that the server has of them: as many as were accepted."""
    p99_ms: float


@contextlib.contextmanager
def server(data: str, cores: set[int], *flags: str) -> Iterator[tuple[str, ServerProcess]]:
    """A server on some cores: its address and process."""
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", "--data-dir", data]
    with started([*command, "--log-level", "warning", *flags], cores) as running:
        yield running


def _request(work: Work, steps: int) -> generation_service_pb2.GenerateRequest:
    request = generation_service_pb2.GenerateRequest(model=work.model, request_id=str(uuid.uuid4()))
    request.prompts.add(prompt="a red circle", width=work.side, height=work.side, sample_steps=steps, seed=1)
    return request


def _create(target: str, work: Work, steps: int) -> str:
    with grpc.insecure_channel(target) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        created = stub.CreateJob(job_service_pb2.CreateJobRequest(request=_request(work, steps)), timeout=30)
        return created.job.job_id


def _watch_many(target: str, job_id: str, count: int, cores: set[int], ready: Any, go: Any, told: Any) -> None:
    """One process of watchers; tells each one's sequences and everybody's latencies."""
    os.sched_setaffinity(0, cores)

    async def watch(stub: Any) -> tuple[list[int], list[float]]:
        sequences, late = [], []
        begun = time.time()
        async for response in stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id)):
            now = time.time()
            event = response.event
            if event.HasField("heartbeat"):
                continue
            sequences.append(event.sequence)
            happened = event.time.seconds + event.time.nanos / 1e9
            if happened > begun + 1.0:  # what was there before, and the rush of arriving, is no latency
                late.append(now - happened)
        return sequences, late

    async def run() -> list[tuple[list[int], list[float]]]:
        channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(max(1, count // 25))]
        for channel in channels:
            await channel.channel_ready()
        ready.release()
        go.wait()
        stubs = [job_service_pb2_grpc.JobServiceStub(channel) for channel in channels]
        found = await asyncio.gather(*(watch(stubs[index % len(stubs)]) for index in range(count)))
        for channel in channels:
            await channel.close()
        return found

    told.put(asyncio.run(run()))


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def _steps(target: str, job_id: str) -> list[float]:
    with Client(target) as client:
        return [1000 * event.duration_s for event in client.watch_job(job_id) if hasattr(event, "sigma")][5:]


def watched(target: str, work: Work, process: ServerProcess, count: int, cores: set[int]) -> Watched:
    """One job and so many watchers of it."""
    alone_ms = alone(target, work)
    context = get_context("spawn")
    ready, go, told = context.Semaphore(0), context.Event(), context.Queue()
    shares = [min(PER_PROCESS, count - begin) for begin in range(0, count, PER_PROCESS)]
    # Something runs meanwhile, so that the job that is measured begins once everybody watches it.
    before = _create(target, work, max(work.steps // 2, 10))
    job_id = _create(target, work, work.steps)
    watchers = [
        context.Process(target=_watch_many, args=(target, job_id, share, cores, ready, go, told))
        for share in shares
    ]
    for watcher in watchers:
        watcher.start()
    for _ in watchers:
        ready.acquire()
    rss = process.rss_bytes()
    go.set()
    peak, cpu, clock = rss, process.cpu_s(), time.monotonic()
    found: list[tuple[list[int], list[float]]] = []
    while len(found) < count:
        with contextlib.suppress(Exception):
            found += told.get(timeout=0.2)
        peak = max(peak, process.rss_bytes())
    spent = process.cpu_s() - cpu
    seconds = time.monotonic() - clock
    for watcher in watchers:
        watcher.join()
    with Client(target) as client:
        client.delete_job(before)
    whole = max((sequences for sequences, _ in found), key=len)
    late = [value for _, values in found for value in values]
    step_ms = median(_steps(target, job_id))
    return Watched(
        watchers=count,
        jobs=1,
        events=sum(len(sequences) for sequences, _ in found),
        complete=sum(sequences == whole for sequences, _ in found),
        p50_ms=1000 * _percentile(late, 0.5),
        p99_ms=1000 * _percentile(late, 0.99),
        worst_ms=1000 * max(late, default=0.0),
        step_ms=step_ms,
        slowdown=step_ms / ((alone_ms + alone(target, work)) / 2) - 1,
        rss_growth_mb=(peak - rss) / 1e6,
        server_cpu=spent / seconds,
    )


def alone(target: str, work: Work) -> float:
    """The step time of a job that nobody watches, in milliseconds."""
    job_id = _create(target, work, work.steps)
    with Client(target) as client:
        while not client.get_job(job_id).HasField("end_time"):
            time.sleep(0.25)
    return median(_steps(target, job_id))


async def created(target: str, work: Work, rate: int, seconds: float) -> Created:
    """So many `CreateJob` a second."""
    outcomes: dict[str, int] = {"OK": 0}
    took: list[float] = []
    ids: set[str] = set()

    async def one(stub: Any) -> None:
        begun = time.monotonic()
        try:
            answer = await stub.CreateJob(job_service_pb2.CreateJobRequest(request=_request(work, 1)), timeout=30)
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] = outcomes.get(error.code().name, 0) + 1
        else:
            outcomes["OK"] += 1
            ids.add(answer.job.job_id)
        took.append(1000 * (time.monotonic() - begun))

    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        listed = {job.job_id for job in await _all(stub)}
        begun, calls = time.monotonic(), []
        for index in range(int(rate * seconds)):
            calls.append(asyncio.create_task(one(stub)))
            await asyncio.sleep(max(0.0, begun + (index + 1) / rate - time.monotonic()))
        await asyncio.gather(*calls)
        listed = {job.job_id for job in await _all(stub)} - listed
    full = outcomes.pop("RESOURCE_EXHAUSTED", 0)
    accepted = outcomes.pop("OK")
    assert listed == ids
    return Created(len(took), accepted, full, sum(outcomes.values()), len(listed), _percentile(took, 0.99))


async def _all(stub: Any) -> list[Any]:
    found, token = [], ""
    while True:
        page = await stub.ListJobs(job_service_pb2.ListJobsRequest(page_size=1000, page_token=token), timeout=30)
        found += page.jobs
        token = page.next_page_token
        if not token:
            return found


def reattached(target: str, work: Work, cuts: int = 20) -> list[float]:
    """Milliseconds from a new `WatchJob` over a standing connection to the first event that was missed."""
    found: list[float] = []
    with grpc.insecure_channel(target) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        while len(found) < cuts:
            job_id = _create(target, work, work.steps)
            sequence = 0
            while len(found) < cuts:
                job = stub.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=30).job
                if job.HasField("end_time"):
                    break
                if job.last_sequence == sequence:  # nothing is missed yet
                    time.sleep(0.02)
                    continue
                begun = time.monotonic()
                call = stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id, after_sequence=sequence))
                sequence = next(call).event.sequence
                found.append(1000 * (time.monotonic() - begun))
                while sequence < job.last_sequence:
                    sequence = next(call).event.sequence
                call.cancel()
                time.sleep(0.15)  # events go by meanwhile
            stub.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id))
    return found


def idle(process: ServerProcess, seconds: float = 20.0) -> float:
    """The share of one core that a server takes that nobody asks anything."""
    time.sleep(2.0)
    before, begun = process.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return (process.cpu_s() - before) / (time.monotonic() - begun)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--threads", type=int, default=1, help="of the pipeline on a CPU")
    parser.add_argument("--folder", help="full-size checkpoint: served on a GPU, 1024x1024")
    parser.add_argument("--create-s", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    mine, others = set(cores[:2]), set(cores[2:]) or set(cores[:2])
    work, flags = Work("chroma-mini", 256, 150), ["--device", "cpu", "--threads", str(arguments.threads)]
    if arguments.folder:
        work, flags = Work("chroma", 1024, 50), ["--model-folder", f"chroma={arguments.folder}"]
        mine = set(cores[: len(cores) // 2])
        others = set(cores) - mine
    os.sched_setaffinity(0, others)
    result: dict[str, Any] = {
        "bench": "watchers",
        "commit": commit(),
        "server_cores": len(mine),
        "watcher_cores": len(others),
        "watchers_share_cores": mine == others,
        "work": asdict(work),
    }
    with (
        tempfile.TemporaryDirectory() as data,
        server(data, mine, "--preload", work.model, *flags) as (target, process),
    ):
        result["idle_cpu"] = idle(process)
        print(f"idle: {100 * result['idle_cpu']:.2f} % of a core", flush=True)
        alone(target, work)  # what is slow the first time
        print(f"{'watchers':>9}{'events':>9}{'complete':>9}{'p50 ms':>8}{'p99 ms':>8}{'worst':>8}", end="")
        print(f"{'ms/step':>9}{'slower':>8}{'RSS MB':>8}{'CPU':>6}", flush=True)
        result["watched"] = []
        for count in arguments.watchers:
            w = watched(target, work, process, count, others)
            result["watched"].append(asdict(w))
            print(
                f"{w.watchers:>9}{w.events:>9}{w.complete:>9}{w.p50_ms:>8.1f}{w.p99_ms:>8.1f}{w.worst_ms:>8.1f}"
                f"{w.step_ms:>9.1f}{100 * w.slowdown:>7.1f}%{w.rss_growth_mb:>8.1f}{w.server_cpu:>6.2f}",
                flush=True,
            )
        result["reattach_ms"] = reattached(target, work)
        print(
            f"reattached: median {median(result['reattach_ms']):.1f} ms, worst {max(result['reattach_ms']):.1f} ms"
        )
        made = asyncio.run(created(target, work, 20, arguments.create_s))
        result["created"] = asdict(made)
        print(
            f"CreateJob, 20 a second: {made.calls} calls, {made.accepted} accepted, "
            f"{made.refused_full} QUEUE_FULL, {made.other} else, {made.listed} listed, "
            f"99th percentile {made.p99_ms:.1f} ms"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
