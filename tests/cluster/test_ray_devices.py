"""How many actors there are, which of them become devices, and what is said where none does; without Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from chromarpc_server.cluster import ray_devices
from chromarpc_server.cluster.certificate import NAME, make_actor_tls
from chromarpc_server.cluster.cluster_size import ClusterSize
from chromarpc_server.cluster.host_server import HostServer
from chromarpc_server.cluster.invitation import Invitation
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import HostSettings
from chromarpc_server.cluster.placement import Cluster, Placing, RayPlacement
from chromarpc_server.cluster.ray_devices import ClusterSettings, RayDevices
from chromarpc_server.cluster.versions import own_versions
from chromarpc_server.domain.errors import DeviceLost
from chromarpc_server.runtime.device import Device, DeviceWithdrawn
from chromarpc_server.runtime.running_time import RunningTime
from tests.cluster.stand import MODEL


class FakeRay:
    """Places actors as long as there is room, in this process."""

    def __init__(self, room: int) -> None:
        self.cluster = Cluster(gpus=0, cpus=room)
        self.is_answering = False
        self.versions = dict(own_versions())
        self.fails: str | None = None
        """What starting an actor fails with."""
        self.odd = 0
        """So many of the first actors have another torch, each on a host of its own."""
        self.dying = 0
        """So many of the first actors end once they are asked to open their device."""
        self.is_late = False
        """Whether there is no cluster yet when it is joined."""
        self.is_closed = False
        self.actors: dict[str, asyncio.Task[None]] = {}
        self.asked = 0
        self._waiting: list[Invitation] = []
        self._listener: Placing | None = None

    def open(self, listener: Placing) -> None:
        self._listener = listener
        if not self.is_late:
            self.up()

    def up(self) -> None:
        assert self._listener is not None
        self.is_answering = True
        self._listener.cluster_up("fake:1", "127.0.0.1")

    def gone(self, why: str) -> None:
        assert self._listener is not None
        self.is_answering = False
        self._listener.cluster_gone(why)

    def start_actor(self, invitation: Invitation) -> None:
        self.asked += 1
        self._waiting.append(invitation)
        asyncio.get_running_loop().call_soon(self._place)

    def end_actor(self, actor: str) -> None:
        self._waiting = [one for one in self._waiting if one.actor != actor]
        if (task := self.actors.pop(actor, None)) is not None:
            task.cancel()
        asyncio.get_running_loop().call_soon(self._place)

    def close(self) -> None:
        self.is_closed = True
        for task in self.actors.values():
            task.cancel()

    def _place(self) -> None:
        while self._waiting and len(self.actors) < self.cluster.cpus and not self.is_closed:
            invitation = self._waiting.pop(0)
            if self.fails is not None:
                assert self._listener is not None
                self._listener.actor_ended(invitation.actor, self.fails)
            else:
                self.actors[invitation.actor] = asyncio.create_task(self._act(invitation))

    async def _act(self, invitation: Invitation) -> None:
        tls = make_actor_tls(invitation.trusted)
        link = Link(
            *await asyncio.open_connection(invitation.host, invitation.port, ssl=tls, server_hostname=NAME)
        )
        link.greet(
            {
                "actor": invitation.actor,
                "token": invitation.token,
                "host": f"odd-{self.odd}" if self.odd > 0 else "gpu-1",
                "pid": 7,
                "versions": self.versions | ({"torch": "1.0"} if self.odd > 0 else {}),
            }
        )
        self.odd -= 1
        if self.dying > 0:
            self.dying -= 1
            await link.receive()
            link.abort()
            assert self._listener is not None
            return self._listener.actor_ended(invitation.actor, "")
        return await HostServer(link).serve()


@asynccontextmanager
async def source(
    checkpoint: Path,
    size: ClusterSize,
    ray: FakeRay,
    *,
    jobs: Callable[[], int] = lambda: 0,
    idle_s: float = 0.1,
    preload: tuple[str, ...] = (),
    port: int = 0,
) -> AsyncIterator[tuple[RayDevices, list[Device]]]:
    running_time = RunningTime()
    hosts = HostSettings(
        device="cpu",
        threads=1,
        model_folders=((MODEL, checkpoint), ("chroma", checkpoint / "nowhere")),
        served_models=(MODEL,),
        preloaded_models=preload,
    )
    devices = RayDevices(
        cast(RayPlacement, ray),
        ClusterSettings(size, hosts, ("reference",), port=port, idle_s=idle_s),
        running_time,
    )
    devices.follow(jobs, lambda: None)
    joined: list[Device] = []
    await asyncio.wait_for(devices.open(joined.append), 60)
    try:
        yield devices, joined
    finally:
        devices.close()
        for device in joined:
            device.close()
        await asyncio.gather(*ray.actors.values(), return_exceptions=True)
        await asyncio.sleep(0)
        assert ray.is_closed


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_devices, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(ray_devices, "NONE_S", 0.5)


async def _until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.01)


async def test_every_gpu_of_the_cluster_becomes_a_device_and_new_ones_do_later(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=2)
    async with source(tiny_checkpoint, ClusterSize(), ray) as (devices, joined):
        assert {device.description.id for device in joined} == {"ray:0", "ray:1"}
        assert devices.missing() == ""
        ray.cluster = Cluster(gpus=0, cpus=3)
        await _until(lambda: len(joined) == 3)
        assert joined[2].description.id == "ray:2"


async def test_a_lost_actor_is_replaced_under_its_name(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=1)
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (_, joined):
        next(iter(ray.actors.values())).cancel()
        assert isinstance(await joined[0].lost(), DeviceLost)
        await _until(lambda: len(joined) == 2)
        assert joined[1].description.id == joined[0].description.id


async def test_other_versions_are_refused_and_keep_their_gpu_for_a_while(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(room=1)
    ray.versions |= {"torch": "1.0"}
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (devices, joined):
        assert joined == []
        assert "gpu-1 has torch 1.0 instead of" in devices.missing()
        await asyncio.sleep(0.2)
        assert ray.asked == 1
        assert [record.msg for record in caplog.records].count("actor.refused") == 1


async def test_a_host_without_the_weights_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ray = FakeRay(room=1)
    async with source(tmp_path, ClusterSize(1, 1), ray) as (devices, joined):
        assert joined == []
        assert "the weights of" in devices.missing()
        assert "on the host" in devices.missing()


async def test_a_host_without_weights_to_preload_is_refused_and_stops_no_start(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=1)
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray, preload=("chroma",)) as (devices, joined):
        assert joined == []
        assert "the weights of chroma are not on the host" in devices.missing()


async def test_actors_that_cannot_start_are_asked_for_ever_less_often(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=1)
    ray.fails = "ModuleNotFoundError: No module named 'torch'"
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (devices, _):
        assert "No module named 'torch'" in devices.missing()
        assert ray.asked == 1  # the next one in a second


async def test_the_number_follows_the_jobs_between_its_bounds(tiny_checkpoint: Path) -> None:
    ray, jobs = FakeRay(room=4), 0
    size = ClusterSize(0, 2)
    async with source(tiny_checkpoint, size, ray, jobs=lambda: jobs) as (devices, joined):
        assert joined == []
        assert devices.missing() == ""  # one comes as soon as a job does
        jobs = 5
        await _until(lambda: len(joined) == 2)
        await asyncio.sleep(0.1)
        assert ray.asked == 2
        jobs = 0
        for device in joined:
            assert isinstance(await device.lost(), DeviceWithdrawn)
        await _until(lambda: not ray.actors)


async def test_the_least_number_is_kept_when_others_are_given_back(tiny_checkpoint: Path) -> None:
    ray, jobs = FakeRay(room=3), 3
    async with source(tiny_checkpoint, ClusterSize(1, 3), ray, jobs=lambda: jobs) as (_, joined):
        await _until(lambda: len(joined) == 3)
        jobs = 0
        await _until(lambda: len(ray.actors) == 1)
        await asyncio.sleep(0.2)  # it is not given back either
        assert (len(ray.actors), ray.asked) == (1, 3)


async def test_another_actor_is_asked_for_in_place_of_one_that_was_refused(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=2)
    ray.odd = 1
    async with source(tiny_checkpoint, ClusterSize(0, 2), ray, jobs=lambda: 1) as (devices, joined):
        await _until(lambda: joined)
        assert devices.missing() == ""
        assert ray.asked == 2


async def test_an_actor_that_ends_while_it_opens_its_device_bars_nobody(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(room=1)
    ray.dying = 1
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (_, joined):
        await _until(lambda: joined)
    assert "actor.refused" not in caplog.messages


async def test_a_stop_while_a_device_opens_leaves_the_cluster(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asyncio.Event()

    async def never(*_: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(HostServer, "_open", never)
    ray = FakeRay(room=1)
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (devices, _):
        await asyncio.wait_for(asked.wait(), 10)
        devices.close()
        assert ray.is_closed
        await asyncio.sleep(0)
    assert "actor.refused" not in caplog.messages


async def test_a_port_that_is_taken_is_named_until_it_is_free(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=1)
    ray.is_late = True
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with source(tiny_checkpoint, ClusterSize(0, 1), ray, port=port) as (devices, _):
            ray.up()
            await _until(lambda: "the port for actors cannot be opened" in devices.missing())
            taken.close()
            await _until(lambda: devices.missing() == "")


async def test_a_head_that_is_gone_takes_its_devices_and_is_named_until_it_is_back(tiny_checkpoint: Path) -> None:
    ray = FakeRay(room=1)
    async with source(tiny_checkpoint, ClusterSize(1, 1), ray) as (devices, joined):
        ray.gone("Ray's head does not answer")
        assert (await joined[0].lost()).message == devices.missing() == "Ray's head does not answer"
        ray.up()
        await _until(lambda: len(joined) == 2)
        assert devices.missing() == ""


async def test_a_start_that_waits_ends_with_a_stop(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_devices, "NONE_S", 600)
    ray = FakeRay(room=0)
    hosts = HostSettings(device="cpu", model_folders=((MODEL, tiny_checkpoint),))
    devices = RayDevices(
        cast(RayPlacement, ray), ClusterSettings(ClusterSize(1, 1), hosts), running_time := RunningTime()
    )
    opening = asyncio.create_task(devices.open(lambda _: None))
    await _until(lambda: ray.asked)
    devices.close()
    await asyncio.wait_for(opening, 5)
    assert ray.is_closed
    running_time.close()


@pytest.mark.parametrize(
    ("size", "in_cluster", "jobs", "wanted"),
    [
        (ClusterSize(), 8, 0, 8),
        (ClusterSize(4, 4), 8, 0, 4),
        (ClusterSize(4, 4), 2, 9, 4),
        (ClusterSize(0, 8), 2, 0, 0),
        (ClusterSize(0, 8), 2, 5, 5),
        (ClusterSize(2, 8), 0, 0, 2),
        (ClusterSize(2, 8), 0, 99, 8),
    ],
)
def test_how_many_are_asked_for(size: ClusterSize, in_cluster: int, jobs: int, wanted: int) -> None:
    assert replace(size).wanted(in_cluster=in_cluster, jobs=jobs) == wanted
