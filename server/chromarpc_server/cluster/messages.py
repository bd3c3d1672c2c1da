"""What the server and an actor say to each other, once the server knows who speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chromarpc_server.cluster.wire import register
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.limits import Budgets, DeviceTimeouts
from chromarpc_server.domain.models import REGISTRY, ModelSpec
from chromarpc_server.domain.plan import Plan
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.work import Report, WorkDone

PIECE_BYTES = 1024**2
"""Of an adapter's file in one message."""


@dataclass(frozen=True)
class HostSettings:
    """What the server's operator decided, for its actors."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    budgets: Budgets = Budgets()
    timeouts: DeviceTimeouts = DeviceTimeouts()
    model_folders: tuple[tuple[str, Path], ...] = ()
    """Where models lie on every host; the Hugging Face cache otherwise."""
    models: tuple[ModelSpec, ...] = tuple(REGISTRY.values())
    """The server's own: what their ids mean on every host."""
    served_models: tuple[str, ...] = ()
    """A host needs the weights of one of them at least."""
    preloaded_models: tuple[str, ...] = ()
    """And of each of these."""
    content_folder: Path | None = None
    """Where a host keeps adapters; in this user's cache folder if None."""
    content_bytes: int = 32 * 1024**3
    """Of that folder."""


@dataclass(frozen=True)
class Open:
    """To the actor, first: open the device."""

    device_id: str
    settings: HostSettings


@dataclass(frozen=True)
class Opened:
    """From the actor: the device is open, or cannot be used."""

    description: DeviceDescription | None
    error: ChromaError | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    """Of the served models' parts that its host has: hashes of their headers, the same on every host."""


@dataclass(frozen=True)
class HashedFile:
    """An adapter's content."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Run:
    """To the actor: do this work."""

    epoch: int
    """Of the device; what belongs to an earlier one comes too late."""
    id: str
    plan: Plan
    adapters: tuple[HashedFile, ...]


@dataclass(frozen=True)
class Load:
    """To the actor: make a model resident."""

    epoch: int
    model_id: str
    profile: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cancel:
    """To the actor: stop that, because of this."""

    epoch: int
    cause: ChromaError


@dataclass(frozen=True)
class Reports:
    """From the actor: what the work reports, in order."""

    epoch: int
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class Ended:
    """From the actor: that work is done, or ended early."""

    epoch: int
    done: WorkDone | None = None
    error: ChromaError | None = None
    traceback: str = field(default="", repr=False)
    """Of an exception that nobody foresaw, for the server's log."""


@dataclass(frozen=True)
class Wanted:
    """From the actor: a file that its host does not have."""

    sha256: str
    fetch: int
    """Counts; the pieces of an earlier one may still be on their way."""


@dataclass(frozen=True)
class Piece:
    """To the actor: bytes of a file that it wanted."""

    fetch: int
    data: bytes = field(repr=False)
    is_last: bool = False
    error: ChromaError | None = None


@dataclass(frozen=True)
class Resident:
    """From the actor: what is resident has changed."""

    snapshot: CacheSnapshot


@dataclass(frozen=True)
class Beat:
    """From the actor, a few times a second: it is there."""

    memory_used_bytes: int


@dataclass(frozen=True)
class Logged:
    """From the actor: a line for the server's log; Ray's get none of ours."""

    logger: str
    level: int
    event: str
    fields: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    traceback: str = field(default="", repr=False)


register(HostSettings, Open, Opened, HashedFile, Run, Load, Cancel, Reports, Ended)
register(Wanted, Piece, Resident, Beat, Logged)
