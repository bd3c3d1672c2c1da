"""What an event of an actor costs the server, and how late it comes: `python -m bench.ray_events [--out FILE]`.

Events do not go through Ray, so none is needed: stand-ins for actors, in a process of their own, connect as actors
do and report a step every so often. The same is measured with threads of the server's process, so that what a
connection adds is told. Figures are of the server's process: CPU seconds by events, and lag from the moment that a
step is reported to the moment that the engine has it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.machine import commit
from chromarpc_server.cluster.certificate import NAME, make_actor_tls
from chromarpc_server.cluster.hosts_port import Greeting, HostsPort
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import Beat, Ended, HostSettings, Open, Opened, Reports, Run
from chromarpc_server.cluster.outgoing_files import OutgoingFiles
from chromarpc_server.cluster.ray_device import RayDevice, Revisions
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.events import Step, Timings
from chromarpc_server.domain.plan import Plan, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Report, Work, WorkDone

CASES = ((1, 0.033), (16, 0.033))
"""Actors, and seconds of a step."""
SECONDS = 20.0


@dataclass(frozen=True)
class Figure:
    """What one case came to."""

    kind: str
    actors: int
    step_s: float
    events: int
    cpu_ms_an_event: float
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float


class _Lags:
    def __init__(self) -> None:
        self.all: list[float] = []

    def take(self, report: Report) -> None:
        if isinstance(report, Step):
            self.all.append(time.monotonic() - report.sigma)

    def figure(self, kind: str, actors: int, step_s: float, cpu_s: float) -> Figure:
        ordered = sorted(self.all)

        def at(share: float) -> float:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

        cost = round(1000 * cpu_s / len(ordered), 3)
        return Figure(kind, actors, step_s, len(ordered), cost, at(0.5), at(0.99), at(1))


def _step(index: int, steps: int) -> Step:
    """A step whose sigma is the moment it is reported at."""
    return Step(0, index + 1, steps, time.monotonic(), 500.0, 0.033, 1.0)


def _plan(steps: int) -> Plan:
    prompt = PlannedPrompt("a fox", 1024, 1024, steps, 4.0, 1)
    output = PlannedOutput(ImageFormat.PNG, 100)
    return Plan("m", "m", "reference", NoiseDraw.FLOAT32, (prompt,), (), output, None, ())


async def over_connections(actors: int, step_s: float) -> Figure:
    """Actors in another process."""
    arrived: asyncio.Queue[tuple[str, Greeting, Link]] = asyncio.Queue()
    port = HostsPort(lambda *what: arrived.put_nowait(what))
    await port.open("127.0.0.1", 0)
    running_time = RunningTime()
    running_time.start()
    tokens = [(f"a{index}", port.expect(f"a{index}")) for index in range(actors)]
    told = json.dumps({"port": port.port, "trusted": port.trusted, "tokens": tokens, "step_s": step_s})
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, "-m", "bench.ray_events", "--actors", told]
    )
    try:
        files, revisions = OutgoingFiles(), Revisions()
        devices = []
        for index in range(actors):
            _, greeting, link = await arrived.get()
            device = RayDevice(f"ray:{index}", greeting.host, link, files, revisions, running_time, HostSettings())
            await device.open()
            devices.append(device)
        lags, steps = _Lags(), int(SECONDS / step_s)
        nowhere = CheckpointFiles(Path(), Path(), Path(), Path(), None)
        cpu_s = time.process_time()
        await asyncio.gather(
            *(device.run(Work("j", _plan(steps), nowhere, (), Cancellation()), lags.take) for device in devices)
        )
        cpu_s = time.process_time() - cpu_s
        for device in devices:
            device.close()
    finally:
        process.terminate()
        process.wait()
        running_time.close()
        await port.close()
    return lags.figure("actors", actors, step_s, cpu_s)


async def over_threads(actors: int, step_s: float) -> Figure:
    """Threads of this process."""
    lags, steps, loop = _Lags(), int(SECONDS / step_s), asyncio.get_running_loop()

    def run() -> None:
        for index in range(steps):
            time.sleep(step_s)
            loop.call_soon_threadsafe(lags.take, _step(index, steps))

    threads = [threading.Thread(target=run) for _ in range(actors)]
    cpu_s = time.process_time()
    for thread in threads:
        thread.start()
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    return lags.figure("threads", actors, step_s, time.process_time() - cpu_s)


async def _act(port: int, trusted: str, actor: str, token: str, step_s: float) -> None:
    tls = make_actor_tls(trusted)
    link = Link(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=NAME))
    link.greet({"actor": actor, "token": token, "host": "h", "pid": 1, "versions": {}})

    async def beat() -> None:
        while True:
            link.send(Beat(0))
            await asyncio.sleep(0.5)

    beating = asyncio.create_task(beat())
    while True:
        match await link.receive():
            case Open(device_id=device_id):
                link.send(Opened(DeviceDescription(device_id, "stand-in", 0, "float32")))
            case Run(epoch=epoch, plan=plan):
                steps = plan.prompts[0].sample_steps
                for index in range(steps):
                    await asyncio.sleep(step_s)
                    link.send(Reports(epoch, (_step(index, steps),)))
                link.send(Ended(epoch, WorkDone(Timings(), 0)))
                await link.drain()
            case _:
                beating.cancel()


async def _act_all(told: str) -> None:
    said = json.loads(told)
    await asyncio.gather(
        *(_act(said["port"], said["trusted"], *names, said["step_s"]) for names in said["tokens"]),
        return_exceptions=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures there")
    parser.add_argument("--actors", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.actors:
        asyncio.run(_act_all(options.actors))
        return
    measures: tuple[Callable[[int, float], asyncio.Future[Figure]], ...] = (over_threads, over_connections)  # type: ignore[assignment]
    figures = [asyncio.run(measure(*case)) for case in CASES for measure in measures]  # type: ignore[arg-type]
    for figure in figures:
        print(json.dumps(asdict(figure)))
    if options.out is not None:
        result = {
            "bench": "ray_events",
            "commit": commit(),
            "cores": os.cpu_count(),
            "figures": [asdict(figure) for figure in figures],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
