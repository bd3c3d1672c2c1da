"""Throughput and event lag for 1, 2, 4 and 8 devices: `python -m bench.scale [--step-ms 33] [--out FILE.json]`.

On stand-ins (see `bench.stand_in`) it says what the front costs: one server process, on two cores if there are
more, and clients that watch every job, on the other cores then. On GPUs it says what more of them bring:

    python -m bench.scale --devices cuda:0 cuda:0,cuda:1 [--folder DIR] [--profile fp8] [--size 1024x1024]

Each entry of `--devices` is a server's; `ray:2` is one too. All ratios are to the first one, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from bench.machine import commit
from bench.results_file import Json, table
from bench.server_process import started
from chromarpc import Client
from chromarpc.v1 import generation_service_pb2, job_service_pb2, job_service_pb2_grpc

COUNTS = (1, 2, 4, 8)
STAND_IN_STEPS = 25
SIDES = {True: 512, False: 1024}
"""Of stand-ins' images, by whether a step takes less than 100 ms."""
LIMITS = ("max-queued-jobs", "max-queued-jobs-per-caller", "max-streams", "max-streams-per-caller")
_OPTIONS = [("grpc.max_receive_message_length", 16 * 2**20)]


@dataclass(frozen=True)
class Request:
    """What each job draws."""

    model: str
    profile: str
    width: int
    height: int
    steps: int


@dataclass(frozen=True)
class Figure:
    """What a server with so many devices did."""

    devices: str
    count: int
    jobs: int
    images_per_s: float
    ratio: float
    """To the first server of the run."""
    efficiency: float
    """To as many times the first one as there are more devices."""
    step_ms: float
    lag_p50_ms: float
    lag_p99_ms: float
    """From an event's own time to a client that has it."""
    thread_lag_p99_ms: float | None
    """From the device's thread to the event loop; of stand-ins only."""
    cpu: float
    """CPU seconds a second of the server."""
    cpu_ms_per_event: float
    """More than the stand-ins' own, for each event."""


@dataclass(frozen=True)
class _Watched:
    begun_s: float
    ended_s: float
    durations_s: list[float]
    lags_s: list[float]
    events: int


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def _drawn(target: str, request: Request, count: int) -> list[_Watched]:
    """So many jobs, handed in together and watched each."""
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        stub: Any = job_service_pb2_grpc.JobServiceStub(channel)

        async def create(seed: int) -> str:
            message = generation_service_pb2.GenerateRequest(model=request.model, profile=request.profile)
            message.prompts.add(
                prompt="a red circle",
                width=request.width,
                height=request.height,
                sample_steps=request.steps,
                seed=seed,
            )
            created = await stub.CreateJob(job_service_pb2.CreateJobRequest(request=message), timeout=60)
            return str(created.job.job_id)

        async def watch(job_id: str) -> _Watched:
            begun, ended, durations, lags, events = 0.0, 0.0, [], [], 0
            watched_since = None  # what had happened before the stream stood is not late
            async for response in stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id)):
                now, event = time.time(), response.event
                happened = event.time.seconds + event.time.nanos / 1e9
                events += 1
                watched_since = watched_since or now
                match event.WhichOneof("event"):
                    case "prepared":
                        begun = happened
                    case "step":
                        durations.append(event.step.duration.seconds + event.step.duration.nanos / 1e9)
                        if happened > watched_since:
                            lags.append(now - happened)
                    case "failed" | "cancelled":
                        sys.exit(f"a job did not end well: {event}")
                    case "completed":
                        ended = happened
            return _Watched(begun, ended, durations, lags, events)

        jobs = [await create(seed) for seed in range(count)]
        return list(await asyncio.gather(*map(watch, jobs)))


def measured(
    devices: str, command: Sequence[str], request: Request, jobs_each: int, lags: Path | None, held_ms: float
) -> Figure:
    """What one server does; `ratio` and `efficiency` are still to be filled in."""
    cores = sorted(os.sched_getaffinity(0))
    mine = set(cores[:2]) if lags is not None and len(cores) > 2 else None
    if mine is not None:
        os.sched_setaffinity(0, set(cores) - mine)
    try:
        with started(command, mine) as (target, process):
            with Client(target) as client:
                count = len(client.server_info().devices)
            asyncio.run(_drawn(target, request, count))  # what is slow the first time
            cpu_s, clock = process.cpu_s(), time.monotonic()
            watched = asyncio.run(_drawn(target, request, count * jobs_each))
            cpu_s, clock = process.cpu_s() - cpu_s, time.monotonic() - clock
    finally:
        os.sched_setaffinity(0, cores)
    took_s = max(one.ended_s for one in watched) - min(one.begun_s for one in watched)
    late = [value for one in watched for value in one.lags_s]
    steps = sum(len(one.durations_s) for one in watched)
    thread_lags: list[float] | None = None if lags is None else json.loads(lags.read_text())
    return Figure(
        devices=devices,
        count=count,
        jobs=len(watched),
        images_per_s=len(watched) / took_s,
        ratio=1.0,
        efficiency=1.0,
        step_ms=1000 * median(value for one in watched for value in one.durations_s),
        lag_p50_ms=1000 * _percentile(late, 0.5),
        lag_p99_ms=1000 * _percentile(late, 0.99),
        thread_lag_p99_ms=None if thread_lags is None else 1000 * _percentile(thread_lags, 0.99),
        cpu=cpu_s / clock,
        cpu_ms_per_event=(1000 * cpu_s - held_ms * steps) / sum(one.events for one in watched),
    )


def compared(figures: Sequence[Figure]) -> list[Figure]:
    """With ratios to the first one."""
    first = figures[0]
    found = []
    for figure in figures:
        ratio = figure.images_per_s / first.images_per_s
        found.append(
            Figure(**{**asdict(figure), "ratio": ratio, "efficiency": ratio * first.count / figure.count})
        )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="of stand-ins")
    parser.add_argument("--step-ms", type=float, default=33.0, help="of stand-ins: 33 or 206 are an H100's")
    parser.add_argument("--held-ms", type=float, default=1.0, help="of a step, in which Python runs")
    parser.add_argument("--devices", nargs="+", help="real ones instead: each a server's --devices")
    parser.add_argument("--folder", type=Path, help="full-size checkpoint, as bench.synthetic writes it")
    parser.add_argument("--profile", default="reference")
    parser.add_argument("--size", default="1024x1024", help="of real images of a full-size checkpoint")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--jobs", type=int, default=10, help="for each device")
    parser.add_argument("--flags", nargs="+", default=[], help="more flags of the server, without their dashes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures: list[Figure] = []
    print(f"{'devices':>16}{'jobs':>6}{'images/s':>10}{'ratio':>7}{'each':>7}{'ms/step':>9}", end="")
    print(f"{'lag p50':>9}{'p99 ms':>8}{'thread':>8}{'CPU':>6}{'ms/event':>10}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for index, (devices, command, request, lags) in enumerate(_servers(arguments, Path(scratch))):
            flags = ["--port", "0", "--data-dir", f"{scratch}/{index}", "--log-level", "warning"]
            flags += [f"--limits.{limit}=1000" for limit in LIMITS]
            flags += [f"--{flag}" for flag in arguments.flags]
            held_ms = arguments.held_ms if lags is not None else 0.0
            figure = measured(devices, [*command, *flags], request, arguments.jobs, lags, held_ms)
            figures = compared([*figures, figure])
            print(_line(figures[-1]), flush=True)
    if arguments.out:
        result = {
            "bench": "scale",
            "commit": commit(),
            "cores": len(os.sched_getaffinity(0)),
            "step_ms": None if arguments.devices else arguments.step_ms,
            "held_ms": None if arguments.devices else arguments.held_ms,
            "profile": arguments.profile,
            "request": asdict(request),
            "figures": [asdict(one) for one in figures],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _servers(
    arguments: argparse.Namespace, scratch: Path
) -> Iterator[tuple[str, list[str], Request, Path | None]]:
    """Each one's devices, command and requests, and where it says how late its threads were heard."""
    if arguments.devices:
        width, height = map(int, arguments.size.split("x"))
        request = Request("chroma", arguments.profile, width, height, arguments.steps)
        model_flags = ["--model-folder", f"chroma={arguments.folder}", "--warm-up", arguments.size]
        if arguments.folder is None:
            request = Request("chroma-mini", arguments.profile, 256, 256, arguments.steps)
            model_flags = []
        for devices in arguments.devices:
            command = [sys.executable, "-m", "chromarpc_server", "--devices", devices, "--preload", request.model]
            yield devices, [*command, "--profile", arguments.profile, *model_flags], request, None
        return
    side = SIDES[arguments.step_ms < 100]
    for count in arguments.counts:
        lags = scratch / f"{count}.json"
        command = [sys.executable, "-m", "bench.stand_in", "--count", str(count), "--lags", str(lags)]
        command += ["--step-ms", str(arguments.step_ms), "--held-ms", str(arguments.held_ms)]
        command += ["--side-px", str(side)]
        yield f"stand-in x {count}", command, Request("chroma-mini", "reference", 256, 256, STAND_IN_STEPS), lags


def scale_table(result: Json) -> str:
    """For the page about scale."""
    names = (
        "devices",
        "images a second",
        "ratio",
        "of as many",
        "lag p50, p99 ms",
        "CPU of the server",
        "ms an event",
    )
    rows = [
        (
            str(one["devices"]),
            f"{one['images_per_s']:.2f}",
            f"{one['ratio']:.2f}",
            f"{100 * one['efficiency']:.1f} %",
            f"{one['lag_p50_ms']:.1f}, {one['lag_p99_ms']:.1f}",
            f"{one['cpu']:.2f}",
            f"{one['cpu_ms_per_event']:.1f}",
        )
        for one in result["figures"]
    ]
    return table(names, rows)


def _line(figure: Figure) -> str:
    thread = "" if figure.thread_lag_p99_ms is None else f"{figure.thread_lag_p99_ms:.1f}"
    return (
        f"{figure.devices:>16}{figure.jobs:>6}{figure.images_per_s:>10.3f}{figure.ratio:>7.2f}"
        f"{100 * figure.efficiency:>6.1f}%{figure.step_ms:>9.2f}{figure.lag_p50_ms:>9.2f}{figure.lag_p99_ms:>8.1f}"
        f"{thread:>8}{figure.cpu:>6.2f}{figure.cpu_ms_per_event:>10.2f}"
    )


if __name__ == "__main__":
    main()
