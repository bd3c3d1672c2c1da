"""A server's end and an actor's end over a real connection, in one process and without Ray."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.cluster.certificate import NAME, make_actor_tls
from chromarpc_server.cluster.host_server import HostServer
from chromarpc_server.cluster.hosts_port import Greeting, HostsPort
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import HostSettings
from chromarpc_server.cluster.outgoing_files import OutgoingFiles
from chromarpc_server.cluster.ray_device import RayDevice, Revisions
from chromarpc_server.domain.limits import DeviceTimeouts
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPreview, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.pipeline import CheckpointFiles, choose_device
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.device import Device
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Report, Work, WorkDone

MODEL = "chroma-mini"


@dataclass
class Stand:
    """What a test turns over."""

    port: HostsPort
    settings: HostSettings
    files: OutgoingFiles
    revisions: Revisions
    running_time: RunningTime
    arrived: asyncio.Queue[tuple[str, Greeting, Link]]
    hosts: list[asyncio.Task[None]]

    async def device(self, through: int | None = None, settings: HostSettings | None = None) -> RayDevice:
        """Another device, whose actor connects by this port; not opened."""
        actor = f"actor{len(self.hosts)}"
        greeting = {"actor": actor, "token": self.port.expect(actor), "host": actor, "pid": 1, "versions": {}}
        link = await self.connect(through)
        link.greet(greeting)
        self.hosts.append(asyncio.create_task(HostServer(link).serve()))
        name, said, ours = await self.arrived.get()
        assert name == actor
        chosen = settings or self.settings
        return RayDevice(
            f"ray:{len(self.hosts)}", said.host, ours, self.files, self.revisions, self.running_time, chosen
        )

    async def connect(self, through: int | None = None) -> Link:
        """An actor's end of a connection."""
        tls: ssl.SSLContext = make_actor_tls(self.port.trusted)
        port = through or self.port.port
        return Link(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=NAME))


@asynccontextmanager
async def stand(checkpoint: Path, folder: Path, *, step_s: float = 600.0) -> AsyncIterator[Stand]:
    """A port, and hosts that have the tiny checkpoint."""
    arrived: asyncio.Queue[tuple[str, Greeting, Link]] = asyncio.Queue()
    port = HostsPort(lambda *what: arrived.put_nowait(what))
    await port.open("127.0.0.1", 0)
    running_time = RunningTime()
    running_time.start()
    settings = HostSettings(
        device="cpu",
        threads=torch.get_num_threads(),
        timeouts=DeviceTimeouts(step_s=step_s),
        model_folders=((MODEL, checkpoint),),
        served_models=(MODEL,),
        content_folder=folder / "content",
    )
    made = Stand(port, settings, OutgoingFiles(), Revisions(), running_time, arrived, [])
    try:
        yield made
    finally:
        running_time.close()
        await port.close()
        for host in made.hosts:
            host.cancel()
        await asyncio.gather(*made.hosts, return_exceptions=True)


def plan(*loras: str, steps: int = 4, **changes: object) -> Plan:
    """One small image."""
    known = Plan(
        model=MODEL,
        served_model=MODEL,
        profile="reference",
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(PlannedPrompt("a fox in the snow", 64, 64, steps, 4.0, 42),),
        loras=tuple(PlannedLora(path, 1.0) for path in loras),
        output=PlannedOutput(ImageFormat.PNG, 100, picture_record=True),
        preview=PlannedPreview(2, 64),
        warnings=(),
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def work(
    checkpoint: Path, what: Plan, files: tuple[AdapterFile, ...] = (), cancellation: Cancellation | None = None
) -> Work:
    """To draw a plan."""
    return Work("job", what, model_files(checkpoint), files, cancellation or Cancellation())


def model_files(checkpoint: Path) -> CheckpointFiles:
    from chromarpc_server.domain.models import REGISTRY

    return ModelFiles({MODEL: checkpoint}).require(REGISTRY[MODEL])


async def run(device: Device, what: Work) -> tuple[WorkDone, list[Report]]:
    """What comes of work."""
    reports: list[Report] = []
    return await device.run(what, reports.append), reports


async def thread() -> DeviceThread:
    """A device of this process, open."""
    running_time = RunningTime()
    device = DeviceThread(choose_device("cpu", "auto"), running_time)
    await device.open()
    return device
