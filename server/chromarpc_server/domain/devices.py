"""Devices as they are described to clients, and which of them a thread belongs to."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

_CURRENT: ContextVar[str] = ContextVar("device", default="")


def current_device_id() -> str:
    """Id of the device whose thread this is; empty on any other thread."""
    return _CURRENT.get()


def set_current_device_id(device_id: str) -> None:
    """Says whose thread this is, for good: what is logged here, and what is handed over from here, is about it."""
    _CURRENT.set(device_id)


class DeviceState(StrEnum):
    """What a device does now."""

    OPENING = "opening"
    """It is not ready yet: it is opened, or loads what is preloaded."""
    IDLE = "idle"
    BUSY = "busy"
    LOST = "lost"
    """It failed or hung, and is taken out until the process is started again."""


@dataclass(frozen=True)
class DeviceDescription:
    """What a device is."""

    id: str
    """`cpu`, `cuda:0`; `cuda:0+cuda:1` for a pair; unique among a server's devices."""
    name: str
    """The model of the GPU or CPU: equal names, equal bits and equal times."""
    memory_bytes: int
    """Of one card, in a pair too."""
    dtype: str
    """What it computes in: `float32` or `bfloat16`."""
    profiles: tuple[str, ...] = ()
    """Numerics profiles that it can compute."""
    host: str = ""
    """The machine it is in; empty for the server's own."""
    second: str = ""
    """Of a pair: the card that computes the unconditional pass; empty for one card."""
