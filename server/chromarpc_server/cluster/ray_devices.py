"""Devices from a Ray cluster: they come and go while the server runs. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from chromarpc_server.cluster.cluster_size import ClusterSize
from chromarpc_server.cluster.hosts_port import Greeting, HostsPort
from chromarpc_server.cluster.invitation import Invitation
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import HostSettings
from chromarpc_server.cluster.outgoing_files import OutgoingFiles
from chromarpc_server.cluster.placement import RayPlacement
from chromarpc_server.cluster.ray_device import RayDevice, Revisions, UnfitHost
from chromarpc_server.cluster.versions import differences, own_versions
from chromarpc_server.domain.errors import ChromaError, DeviceError, DeviceHung, DeviceLost
from chromarpc_server.runtime.device import Device, DeviceWithdrawn
from chromarpc_server.runtime.running_time import RunningTime

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
FIRST_S = 60.0
"""That the start waits for devices, once one is there; those that come later join later."""
NONE_S = 20.0
"""That the start waits for the first one; the server says NOT_SERVING then, and goes on waiting."""
HELD_S = 60.0
"""How long a host that was refused is left alone; its actor keeps its GPU, so that Ray places others elsewhere."""
MAX_BACKOFF_S = 60.0
"""Between actors that end before they have a device."""


@dataclass(frozen=True)
class ClusterSettings:
    """What an operator decides about a cluster."""

    size: ClusterSize
    hosts: HostSettings
    profiles: tuple[str, ...] = ()
    """Numerics profiles that may be asked for."""
    bind: str | None = None
    """Where actors reach this server; by default this machine's address as Ray knows it."""
    port: int = 0
    idle_s: float = 300.0
    """After which a device that does nothing is given back, where their number follows the queue."""


@dataclass
class _Slot:
    """An actor that was asked for."""

    actor: str
    number: int
    device: RayDevice | None = None
    is_joined: bool = False
    link: Link | None = field(default=None, repr=False)
    """Of one that was refused."""
    held_until: float | None = None


class RayDevices:
    """A source of devices that keeps as many actors as it should."""

    waits_for_more = True

    def __init__(self, placement: RayPlacement, settings: ClusterSettings, running_time: RunningTime) -> None:
        """Starts nothing; see `open`.

        Args:
            placement: has Ray start actors.
            settings: the operator's.
            running_time: the event loop's.
        """
        self._placement = placement
        self._settings = settings
        self._running_time = running_time
        self._port = HostsPort(self._arrived)
        self._address = ""
        """At which actors reach the port."""
        self._files = OutgoingFiles()
        self._revisions = Revisions()
        self._slots: dict[str, _Slot] = {}
        self._barred: dict[str, float] = {}
        """Hosts that were refused, until when."""
        self._join: Callable[[Device], None] = lambda _: None
        self._jobs: Callable[[], int] = lambda: 0
        self._on_missing: Callable[[], None] = lambda: None
        self._was_missing = ""
        self._why = "the Ray cluster is being joined"
        """Why there is no device, where there is none."""
        self._failures = 0
        self._not_before = 0.0
        self._is_closed = False
        self._changed = asyncio.Event()
        self._listening = asyncio.Lock()
        self._failed_to_listen: OSError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, jobs: Callable[[], int], on_missing: Callable[[], None]) -> None:
        """Lets the number of devices follow the queue.

        Args:
            jobs: how many wait and run; asked every second.
            on_missing: called when `missing` has another answer than before.
        """
        self._jobs, self._on_missing = jobs, on_missing

    @property
    def profiles(self) -> tuple[str, ...]:
        """Those that a GPU can compute; what each can do is known once it is there."""
        return self._settings.profiles

    async def open(self, join: Callable[[Device], None]) -> None:
        """Joins the cluster; gives every device to `join` as soon as it is there, also after this returned.

        Raises:
            OSError: the port that actors connect to cannot be bound.
        """
        self._join = join
        await asyncio.to_thread(own_versions)
        self._placement.open(self)
        self._start(self._tend())
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self._is_complete():
            limit_s = FIRST_S if self._joined() else NONE_S
            left_s = began + limit_s - loop.time()
            if left_s <= 0 or self._is_closed:
                break
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
            if self._failed_to_listen is not None:
                self.close()
                raise self._failed_to_listen

    def missing(self) -> str:
        """Why there is no device, in one sentence; empty where some are there, or one comes once a job does."""
        if not self._placement.is_answering:
            return self._why
        if self._joined():
            return ""
        if self._settings.size.follows_jobs and not self._failures and not self._barred:
            return ""
        return self._why

    def refuse(self, device: Device, error: DeviceError) -> None:
        """A host whose device is of no use is left alone for a while; the actor after it keeps its GPU."""
        for slot in self._slots.values():
            if slot.device is not None and slot.device is device:
                slot.device.give_up(UnfitHost(f"{slot.device.host}: {error.message}"))

    def close(self) -> None:
        """No device joins any more; leaves the cluster once those that are there were closed."""
        self._is_closed = True
        self._changed.set()
        for slot in list(self._slots.values()):
            if slot.device is None:
                self._drop(slot)
            elif not slot.is_joined:
                slot.device.close()
        self._leave_if_empty()

    # What placement says.

    def cluster_up(self, address: str, node_ip: str) -> None:
        """A cluster answers."""
        del address
        for slot in list(self._slots.values()):
            if slot.device is None:
                self._drop(slot)
        self._why = "no GPU of the Ray cluster is free yet"
        self._failures, self._not_before = 0, 0.0
        self._start(self._listen(self._settings.bind or node_ip))

    def cluster_gone(self, why: str) -> None:
        """It does not: what runs may end, where it can; nothing new begins."""
        self._why = why
        for slot in list(self._slots.values()):
            if slot.device is None:
                self._drop(slot)
            else:
                slot.device.retire(DeviceLost(why))
        self._changed.set()

    def actor_ended(self, actor: str, why: str) -> None:
        """An actor ended."""
        slot = self._slots.get(actor)
        if slot is None:
            return
        if slot.device is not None:
            slot.device.give_up(DeviceLost(f"Ray says that the actor of {slot.device.host} ended"))
            return
        self._drop(slot)
        self._failed(why or "it ended")

    def _failed(self, why: str) -> None:
        self._delay()
        self._why = f"an actor could not be started: {why}"
        log.warning("actor.failed", extra={"why": why})

    def _delay(self) -> None:
        """What failed is tried again ever later."""
        self._failures += 1
        self._not_before = self._running_time.now() + min(2.0 ** (self._failures - 1), MAX_BACKOFF_S)

    # Keeping the number.

    async def _listen(self, host: str) -> None:
        self._address = host
        async with self._listening:
            if not self._port.is_open:
                try:
                    await self._port.open(host, self._settings.port)
                except OSError as error:
                    log.critical("cluster.cannot_listen", extra={"host": host, "port": self._settings.port})
                    self._failed_to_listen = error
                    self._delay()
                    self._why = f"the port for actors cannot be opened: {error.strerror or error}"
                else:
                    self._failed_to_listen = None
                    self._failures, self._not_before = 0, 0.0
        self._changed.set()
        self._look()

    async def _tend(self) -> None:
        while not self._is_closed:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._failed_to_listen is not None and self._running_time.now() >= self._not_before:
                await self._listen(self._address)
            self._look()
            was_missing, self._was_missing = self._was_missing, self.missing()
            if self._was_missing != was_missing:
                self._on_missing()

    def _look(self) -> None:
        if self._is_closed or not self._placement.is_answering or not self._port.is_open:
            return
        now = self._running_time.now()
        for slot in list(self._slots.values()):
            if slot.held_until is not None and now >= slot.held_until:
                self._drop(slot)
        self._barred = {host: until for host, until in self._barred.items() if until > now}
        wanted, size = self._wanted(), self._settings.size
        # Those that are held draw nothing: others are asked for in their place, as far as there may be any.
        room = max(size.most or 0, self._in_cluster()) - len(self._slots)
        for _ in range(min(wanted - self._usable(), room) if now >= self._not_before else 0):
            self._ask()
        surplus = max(0, self._usable() - wanted)
        waiting = [slot for slot in self._slots.values() if slot.device is None and slot.held_until is None]
        for slot in waiting[::-1][:surplus]:
            self._drop(slot)
        if size.follows_jobs:
            self._give_back_idle(self._usable() - wanted, now)

    def _give_back_idle(self, surplus: int, now: float) -> None:
        unused = [
            device
            for slot in self._slots.values()
            if (device := slot.device) is not None and slot.is_joined and not device.is_gone and not device.is_busy
            if now - device.idle_since >= self._settings.idle_s
        ]
        for device in unused[: max(0, surplus)]:
            device.retire(DeviceWithdrawn(f"{device.host} was given back after {self._settings.idle_s:g} s"))

    def _usable(self) -> int:
        return sum(
            slot.held_until is None and (slot.device is None or not slot.device.is_gone)
            for slot in self._slots.values()
        )

    def _in_cluster(self) -> int:
        cluster = self._placement.cluster
        return cluster.cpus if self._settings.hosts.device == "cpu" else cluster.gpus

    def _wanted(self) -> int:
        return self._settings.size.wanted(in_cluster=self._in_cluster(), jobs=self._jobs())

    def _ask(self) -> None:
        actor = secrets.token_hex(8)
        taken = {slot.number for slot in self._slots.values()}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self._slots[actor] = _Slot(actor, number)
        token = self._port.expect(actor)
        self._placement.start_actor(Invitation(self._address, self._port.port, self._port.trusted, actor, token))

    def _drop(self, slot: _Slot) -> None:
        """Nothing of it is wanted any more."""
        self._slots.pop(slot.actor, None)
        self._port.forget(slot.actor)
        if slot.link is not None:
            slot.link.abort()
        self._placement.end_actor(slot.actor)

    # Actors that connect.

    def _arrived(self, actor: str, greeting: Greeting, link: Link) -> None:
        slot = self._slots.get(actor)
        if slot is None or self._is_closed:
            link.abort()
            return
        differing = differences(own_versions(), greeting.versions)
        if differing:
            self._refuse(slot, link, greeting.host, f"{greeting.host} has {', '.join(differing)}")
        elif greeting.host in self._barred:
            self._hold(slot, link, self._barred[greeting.host])
        else:
            self._start(self._open_device(slot, greeting, link))

    async def _open_device(self, slot: _Slot, greeting: Greeting, link: Link) -> None:
        host = greeting.host
        device = RayDevice(
            f"ray:{slot.number}",
            host,
            link,
            self._files,
            self._revisions,
            self._running_time,
            self._settings.hosts,
        )
        slot.device = device
        try:
            description = await device.open()
        except ChromaError as error:
            slot.device = None
            if device.is_gone and not isinstance(error, UnfitHost | DeviceHung):
                # Nothing is wrong with the host: what was to be its device ended, or is not wanted any more.
                self._drop(slot)
                if self._placement.is_answering and not self._is_closed:
                    self._failed(error.message)
            else:
                self._refuse(slot, link, host, error.message)
            return
        if self._is_closed or slot.actor not in self._slots:
            device.close()
            self._drop(slot)
            self._leave_if_empty()
            return
        self._failures = 0
        log.info(
            "device.opened",
            extra={
                "device": description.id,
                "device_name": description.name,
                "host": host,
                "pid": greeting.pid,
            },
        )
        slot.is_joined = True
        self._join(device)
        self._changed.set()
        await self._await_end(slot, device)

    async def _await_end(self, slot: _Slot, device: RayDevice) -> None:
        error = await device.lost()
        if isinstance(error, UnfitHost):
            self._bar(device.host, error.message)
        elif self._placement.is_answering:
            self._why = error.message
        self._drop(slot)
        if self._is_closed:
            self._leave_if_empty()
        else:
            self._look()

    def _refuse(self, slot: _Slot, link: Link, host: str, why: str) -> None:
        self._hold(slot, link, self._bar(host, why))

    def _bar(self, host: str, why: str) -> float:
        until = self._running_time.now() + HELD_S
        self._barred[host] = until
        self._why = f"an actor was refused: {why}"
        log.error("actor.refused", extra={"host": host, "why": why})
        self._changed.set()
        return until

    def _hold(self, slot: _Slot, link: Link, until: float) -> None:
        slot.link, slot.held_until = link, until

    # Small questions.

    def _joined(self) -> int:
        return sum(
            slot.is_joined and slot.device is not None and not slot.device.is_gone for slot in self._slots.values()
        )

    def _is_complete(self) -> bool:
        if not self._placement.is_answering or not self._port.is_open:
            return False
        size = self._settings.size
        wanted = size.least if size.follows_jobs else self._wanted()
        settled = self._joined() + sum(slot.held_until is not None for slot in self._slots.values())
        return settled >= wanted and (wanted > 0 or size.follows_jobs)

    def _leave_if_empty(self) -> None:
        if not any(slot.device is not None and not slot.device.is_gone for slot in self._slots.values()):
            self._placement.close()
            self._start(self._port.close())

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
