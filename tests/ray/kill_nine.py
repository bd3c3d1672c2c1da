"""Kills servers, actors and hosts of a Ray cluster at random moments, and checks what the server was trusted with.

    python -m tests.ray.kill_nine --rounds 100

In every round a client makes jobs until the server, an actor or a host with all it has is killed with SIGKILL.
What is checked in the end is what `tests.faults.kill_nine` checks: every job that was acknowledged ended once,
no request made two, and each picture has the bytes that its seed gives on one undisturbed device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import chromarpc
from tests.faults.kill_nine import (
    SEEDS,
    Known,
    Report,
    check_files,
    create,
    expected_pictures,
    finish,
    look,
)
from tests.ray.cluster import RayCluster, ray_cluster
from tests.ray.server import RayServer
from tests.tiny_checkpoint import write_tiny_checkpoint

VICTIMS = ("server", "actor", "host")
MAX_LIFE_S = 4.0
AFTER_S = 3.0
"""That jobs are made for after a device was killed."""


@dataclass
class RayReport(Report):
    """What came of a run."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    restarts: int = 0
    """Of jobs, told by the servers' logs."""


def run(rounds: int, seed: int, folder: Path) -> RayReport:
    """Does everything; the folder is left for looking at."""
    chance = random.Random(seed)
    checkpoint = write_tiny_checkpoint(folder / "checkpoint")
    expected = expected_pictures(checkpoint, folder / "undisturbed", threads=1)
    report, known = RayReport(), Known()
    server: RayServer | None = None
    with ray_cluster() as cluster:
        try:
            # Each of them the same number of times, in any order.
            victims = [VICTIMS[index % len(VICTIMS)] for index in range(rounds)]
            chance.shuffle(victims)
            for victim in victims:
                if server is None:
                    server = _start(checkpoint, folder, cluster)
                _kill_while_working(server, cluster, victim, chance, known, report)
                report.rounds += 1
                report.kills[victim] += 1
                print(
                    f"{report.rounds} of {rounds}: {victim}, {report.accepted} jobs", file=sys.stderr, flush=True
                )
                if victim == "server":
                    _note(server, report)
                    server = None
                elif victim == "host":
                    cluster.mend()
            server = server or _start(checkpoint, folder, cluster)
            finish(server, known, expected, report)
            code = server.stop()
            if code:
                report.problems.append(f"the last server ended with {code}")
            _note(server, report)
        finally:
            if server is not None:
                server.close()
    check_files(folder / "data" / "jobs", report)
    return report


def _start(checkpoint: Path, folder: Path, cluster: RayCluster) -> RayServer:
    server = RayServer(checkpoint, folder, cluster.address, "ray", "--job-attempts", "10")
    server.await_devices(len(cluster.hosts))
    return server


def _note(server: RayServer, report: RayReport) -> None:
    report.devices_lost += server.log.count(" device.out ")
    report.restarts += server.log.count(" job.moved ")
    server.close()


def _kill_while_working(
    server: RayServer, cluster: RayCluster, victim: str, chance: random.Random, known: Known, report: RayReport
) -> None:
    over = threading.Event()

    def kill() -> None:
        if victim == "server":
            server.process.kill()
            return
        with suppress(KeyError, ProcessLookupError, IndexError):
            pid = server.pid(chance.choice(sorted(server.opened())))
            if victim == "actor":
                os.kill(pid, signal.SIGKILL)
            else:
                cluster.host_of(pid).kill()
        threading.Timer(AFTER_S, over.set).start()

    timer = threading.Timer(chance.uniform(0, MAX_LIFE_S), kill)
    timer.start()
    try:
        look(server.client, known, report)
        for request_id, seed in list(known.open_requests.items()):
            if create(server.client, known, report, request_id, seed, again=True):
                del known.open_requests[request_id]
        while not over.is_set():
            request_id, seed = str(uuid.UUID(int=chance.getrandbits(128), version=4)), chance.randrange(SEEDS)
            known.open_requests[request_id] = seed
            create(server.client, known, report, request_id, seed)
            del known.open_requests[request_id]
            time.sleep(chance.choice((0.0, 0.0, 0.05, 0.2)))
    except chromarpc.ServerUnavailable:
        if victim != "server":
            report.problems.append(f"the server was gone after a kill of a {victim}")
    finally:
        timer.join()
        if victim == "server":
            server.wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="also write the report there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.rounds, options.seed, Path(folder))
    print(json.dumps(asdict(report), indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
