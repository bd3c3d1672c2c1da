"""Kills a server at random moments, again and again, and checks what it was trusted with.

    python -m tests.faults.kill_nine --rounds 100
    python -m tests.faults.kill_nine --rounds 100 --devices 3

In every round a client makes jobs until the server is killed with SIGKILL, somewhere between its first line and a
few seconds later. A call whose outcome the client does not know is made again in the next round under the same
request id. With several devices, all but one of them are lost in most rounds before the kill, each in the middle
of a job. In the end:

- every job that was acknowledged is there, and has ended (lost: 0);
- no request made two jobs, and no job's end, once seen, ever changed (duplicated: 0);
- each picture has the bytes that its seed gives without any kill;
- a job failed only because the server was killed, or its device was lost, as often as that may be;
- the database is whole, and names exactly the pictures that lie beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sqlite3
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import chromarpc
from chromarpc.v1 import job_service_pb2
from tests.faults.processes import ServerProcess, server_process
from tests.tiny_checkpoint import write_tiny_checkpoint

State = job_service_pb2.JobState
_ENDED = (State.JOB_STATE_SUCCEEDED, State.JOB_STATE_FAILED, State.JOB_STATE_CANCELLED)
SEEDS = 8
MAX_LIFE_S = 3.0
OPTIONS: dict[str, Any] = {"model": "chroma-mini", "width": 128, "height": 128, "sample_steps": 12}


@dataclass
class Report:
    """What came of a run."""

    rounds: int = 0
    accepted: int = 0
    succeeded: int = 0
    exhausted: int = 0
    refused_full: int = 0
    unknown_outcomes: int = 0
    """Calls that the kill cut off."""
    of_which_made: int = 0
    """Those whose job was there afterwards."""
    killed_while_running: int = 0
    devices_lost: int = 0
    lost: int = 0
    duplicated: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Known:
    """What the client was told of jobs."""

    jobs: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Job id to request id and seed."""
    open_requests: dict[str, int] = field(default_factory=dict)
    """Request id to seed, of calls whose outcome is unknown."""
    endings: dict[str, bytes] = field(default_factory=dict)


def run(rounds: int, seed: int, folder: Path, *, devices: int = 1) -> Report:
    """Does everything; the folder is left for looking at."""
    chance = random.Random(seed)
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    threads = 2 if devices == 1 else 1
    expected = expected_pictures(checkpoint, folder / "undisturbed", threads=threads)
    report, known = Report(), Known()
    data_dir = folder / "data"
    for _ in range(rounds):
        with _server(checkpoint, data_dir, devices) as server:
            # Several devices read a model each before the first of them can be lost.
            _work_until_killed(server, chance, known, report, life_s=MAX_LIFE_S * devices)
        report.rounds += 1
        report.devices_lost += server.log.count("device.out")
    with server_process(checkpoint, data_dir, threads=threads) as server:
        finish(server, known, expected, report)
        code = server.stop()
        if code:
            report.problems.append(f"the last server ended with {code}")
    check_files(data_dir / "jobs", report)
    return report


@contextmanager
def _server(checkpoint: Path, data_dir: Path, devices: int) -> Iterator[ServerProcess]:
    """One that loses all its devices but one, if it lives long enough."""
    if devices == 1:
        with server_process(checkpoint, data_dir) as server:
            yield server
        return
    flags = ("--devices", ",".join(["cpu"] * devices), "--job-attempts", "3")
    faulty = {"FAULT": "device_lost", "FAULT_TIMES": str(devices - 1)}
    with (
        mock.patch.dict(os.environ, faulty),
        server_process(checkpoint, data_dir, *flags, module="tests.faults.server", threads=1) as server,
    ):
        yield server


def expected_pictures(checkpoint: Path, data_dir: Path, *, threads: int = 2) -> dict[int, str]:
    """SHA-256 by seed. The number of CPU threads decides roundings, so it is that of servers that are killed."""
    with (
        server_process(checkpoint, data_dir, "--store", "memory", threads=threads) as server,
        chromarpc.Client(server.target) as client,
    ):
        return {
            seed: client.generate_images("a red circle", seed=seed, **OPTIONS)[0].sha256 for seed in range(SEEDS)
        }


def _work_until_killed(
    server: ServerProcess, chance: random.Random, known: Known, report: Report, *, life_s: float
) -> None:
    timer = threading.Timer(chance.uniform(0, life_s), server.process.kill)
    timer.start()
    try:
        with chromarpc.Client(server.target) as client:
            look(client, known, report)
            for request_id, seed in list(known.open_requests.items()):
                if create(client, known, report, request_id, seed, again=True):
                    del known.open_requests[request_id]
            while True:
                request_id, seed = str(uuid.UUID(int=chance.getrandbits(128), version=4)), chance.randrange(SEEDS)
                known.open_requests[request_id] = seed
                create(client, known, report, request_id, seed)
                del known.open_requests[request_id]
                time.sleep(chance.choice((0.0, 0.0, 0.05, 0.2)))
    except chromarpc.ServerUnavailable:
        pass  # killed; what was asked last stays open
    finally:
        timer.join()
        server.wait()


def create(
    client: chromarpc.Client, known: Known, report: Report, request_id: str, seed: int, *, again: bool = False
) -> bool:
    try:
        job = client.create_job("a red circle", seed=seed, request_id=request_id, **OPTIONS)
    except chromarpc.QueueFull:
        report.refused_full += 1
        return True
    except chromarpc.ServerUnavailable:
        report.unknown_outcomes += not again
        raise
    if again and job.create_time.ToSeconds() < time.time() - 1:
        report.of_which_made += 1
    if job.job_id not in known.jobs:
        report.accepted += 1
    known.jobs[job.job_id] = (request_id, seed)
    return True


def look(client: chromarpc.Client, known: Known, report: Report) -> None:
    """Everything that was acknowledged is there, and no end has changed."""
    here = {job.job_id: job for job in client.list_jobs()}
    for job_id in known.jobs.keys() - here.keys():
        report.lost += 1
        report.problems.append(f"job {job_id} is gone")
        del known.jobs[job_id]
    for request_id, count in Counter(job.request_id for job in here.values()).items():
        if count > 1:
            report.duplicated += 1
            report.problems.append(f"{count} jobs have the request id {request_id}")
    for job in here.values():
        report.killed_while_running += job.attempt_count > 1 and job.state not in _ENDED
        if job.state in _ENDED:
            ending = job.SerializeToString(deterministic=True)
            if known.endings.setdefault(job.job_id, ending) != ending:
                report.duplicated += 1
                report.problems.append(f"the end of job {job.job_id} changed")


def finish(server: ServerProcess, known: Known, expected: dict[int, str], report: Report) -> None:
    with chromarpc.Client(server.target) as client:
        look(client, known, report)
        for job_id, (_, seed) in known.jobs.items():
            try:
                for _ in client.watch_job(job_id):
                    pass
            except chromarpc.StatusError as error:
                if error.reason != "ATTEMPTS_EXHAUSTED":
                    report.problems.append(f"job {job_id} failed with {error.reason}")
                report.exhausted += 1
                continue
            report.succeeded += 1
            digest = hashlib.sha256(client.get_image_bytes(job_id)).hexdigest()
            if digest != expected[seed]:
                report.problems.append(f"job {job_id} has another picture than its seed {seed} gives")
        look(client, known, report)


def check_files(folder: Path, report: Report) -> None:
    with sqlite3.connect(folder / "jobs.sqlite3") as database:
        if database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            report.problems.append("the database is damaged")
        left = database.execute("SELECT COUNT(*) FROM jobs WHERE ended_us IS NULL").fetchone()[0]
        named = {row[0] for row in database.execute("SELECT sha256 FROM images")}
    database.close()
    files = {path.name: path for path in (folder / "images").glob("*/*")}
    if left:
        report.problems.append(f"{left} jobs did not end")
    if named != files.keys():
        report.problems.append(f"{len(named ^ files.keys())} pictures are not named, or not there")
    for name, path in files.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != name:
            report.problems.append(f"picture {name} has other bytes")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--devices", type=int, default=1, help="of the server; all but one of them may be lost")
    parser.add_argument("--json", type=Path, help="also write the report there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.rounds, options.seed, Path(folder), devices=options.devices)
    print(json.dumps(asdict(report), indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
