"""What computes one job after the other, as the event loop sees it: a thread here, or another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.devices import DeviceDescription, DeviceState
from chromarpc_server.domain.errors import DeviceError, DeviceLost
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.model_cache import CacheCounters, CacheSnapshot
from chromarpc_server.runtime.work import Emit, Work, WorkDone


class DeviceWithdrawn(DeviceLost):
    """A device leaves in good order: it was given back, or is asked to end."""


class Device(Protocol):
    """Lives on the event loop. Everything that touches a tensor is behind it."""

    @property
    def description(self) -> DeviceDescription:
        """What it is, once opened."""
        ...

    @property
    def snapshot(self) -> CacheSnapshot:
        """What is resident there; answers at once, on any thread."""
        ...

    async def open(self) -> DeviceDescription:
        """Opens it.

        Raises:
            ChromaError: it cannot be used.
        """
        ...

    async def load(
        self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Makes a model resident, warmed up for images of these sizes (width, height in pixels).

        Raises:
            WeightsInvalid, OutOfMemory: it cannot be loaded.
            DeviceError: the device is lost or hangs.
        """
        ...

    async def run(self, work: Work, emit: Emit) -> WorkDone:
        """Does the work.

        Args:
            work: what to do.
            emit: called on the event loop with every report, before this returns; after a `DeviceError`
                reports may still come, and are to be ignored.

        Raises:
            ChromaError: what ended it early; a `DeviceError` where the device is lost or hangs.
        """
        ...

    async def lost(self) -> DeviceError:
        """Waits until it is found to be lost while it runs nothing; for ever where nothing looks meanwhile."""
        ...

    def has_parsed(self, file: AdapterFile) -> bool:
        """Whether an adapter need not be read from its file; answers at once."""
        ...

    def memory_used_bytes(self) -> int:
        """What is held of its memory now, of the host's on a CPU; answers at once, on any thread."""
        ...

    def close(self) -> None:
        """Lets it end once it has done what it was given."""
        ...


class DeviceSource(Protocol):
    """Where a server's devices come from. Lives on the event loop."""

    waits_for_more: bool
    """Whether more may join later, so that a server that has none for the moment is not done for."""

    @property
    def profiles(self) -> tuple[str, ...]:
        """Numerics profiles that one of its devices can compute, as far as that is known."""
        ...

    async def open(self, join: Callable[[Device], None]) -> None:
        """Opens the devices of the start, and gives each to `join`; later ones too, where there may be any.

        Raises:
            ChromaError: one cannot be used, or there is none and none will come.
        """
        ...

    def missing(self) -> str:
        """Why there is no device now, in one sentence; empty where there need be none until a job comes."""
        ...

    def refuse(self, device: Device, error: DeviceError) -> None:
        """A device that joined late is of no use, as whoever has it found: it counts as lost."""
        ...

    def close(self) -> None:
        """Lets no more devices join; those that did are closed by whoever has them."""
        ...


@dataclass(frozen=True)
class DeviceStatus:
    """A device now."""

    description: DeviceDescription
    state: DeviceState
    cache: CacheSnapshot
    memory_used_bytes: int
    jobs: int = 0
    """That it was given since it joined."""
    busy_s: float = 0.0
    """That it spent on them."""
    lost_because: str = ""
    """One sentence, where it is lost."""


def withheld_because(profile: str, model_id: str, devices: Sequence[DeviceStatus]) -> str:
    """Why no device serves a model in this profile; empty where one does, or may once it has loaded the model."""
    working = [device.cache.memory.get(model_id) for device in devices if device.state is not DeviceState.LOST]
    reasons = ["" if plan is None else plan.withholds(profile) for plan in working]
    return reasons[0] if reasons and all(reasons) else ""


def merged(snapshots: Sequence[CacheSnapshot]) -> CacheSnapshot:
    """What is resident on several devices together: bytes and counters summed, sets of all, the first one's plans.

    Parsed adapters lie in the host's memory once for all of its devices, so they are not summed.
    """
    return reduce(_both, snapshots, CacheSnapshot())


def _both(one: CacheSnapshot, other: CacheSnapshot) -> CacheSnapshot:
    return replace(
        other,
        resident_bytes=_summed(one.resident_bytes, other.resident_bytes),
        trainer_parts_bytes=_summed(one.trainer_parts_bytes, other.trainer_parts_bytes),
        sets=(*one.sets, *other.sets),
        counters=CacheCounters(
            one.counters.hits + other.counters.hits,
            one.counters.switches + other.counters.switches,
            one.counters.builds + other.counters.builds,
            one.counters.evictions + other.counters.evictions,
        ),
        adapter_bytes=max(one.adapter_bytes, other.adapter_bytes),
        memory={**other.memory, **one.memory},
        fallbacks=(*one.fallbacks, *(found for found in other.fallbacks if found not in one.fallbacks)),
    )


def _summed(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
