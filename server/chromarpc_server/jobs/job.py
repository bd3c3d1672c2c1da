"""A job: an admitted plan, its event log, and what is known of it by now."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import ChromaError, JobDamaged
from chromarpc_server.domain.events import Restarted
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.log import EndedLog, JobLog
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import SetKey
from chromarpc_server.runtime.running_time import Timer
from chromarpc_server.runtime.work import set_key


@dataclass
class Job:
    """One admitted request on its way through the engine."""

    plan: Plan
    adapter_files: tuple[AdapterFile, ...]
    """Where each of the plan's adapters lies; never sent to the client."""
    cancellation: Cancellation
    owner: str = ""
    """Name of the caller whose job it is; nobody else sees it."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    log: JobLog = field(default_factory=JobLog)
    admitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    position: int = 0
    """In the queue, as clients were last notified; 0 once it runs."""
    fingerprint: str = ""
    """Of the request, as it is stored; see `Fingerprint`."""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: datetime | None = None
    """When it last began to run."""
    attempts: int = 0
    """How often it began to run, in earlier processes too."""
    device_id: str = ""
    """Of the device that runs it, or ran it last; empty before."""
    attached: int = 0
    """Callers that hold on to it."""
    done_steps: int = 0
    pixel_steps_done: int = 0
    overtaken: int = 0
    """How many jobs ran first although it was this one's turn, because their weights were resident."""
    stays_on: str = ""
    """Model of the devices that alone may run it, where one has begun it and others of the same kind are left."""
    adapter_hashes: tuple[str | None, ...] = ()
    """SHA-256 of each adapter as it was read before: by an earlier process, or for the job that is redrawn."""
    encodings: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    """Images that are being encoded and stored."""
    expiry: Timer | None = field(default=None, repr=False)
    """Ends it when it has waited too long; a timer that is not needed any more would hold the job's images."""
    watchers: int = 0
    """Callers that look at it, without holding on to it."""
    absence: Timer | None = field(default=None, repr=False)
    """Runs while the caller that it ends with is away and may come back; ends it then."""
    is_left: bool = False
    """Whether a caller has left it for good, so that nobody is waited for once the others have."""
    cancelled_for_good: ChromaError | None = None
    """Why it is to be stopped whichever process has it, once that was or will be acknowledged."""

    @property
    def set_key(self) -> SetKey:
        """The prepared weights it needs."""
        return set_key(self.plan, self.adapter_files)

    def begin_anew(self, event: Restarted) -> None:
        """Nothing of its last attempt counts: its device was lost, and another one is to run it."""
        self.started_at = self.started = None
        self.done_steps = self.pixel_steps_done = self.position = 0
        self.log.begin_anew(event)

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it says of it: which job, whose, and on which device once it ran."""
        fields = {"job_id": self.id, "caller": self.owner}
        return fields | {"device": self.device_id} if self.device_id else fields

    def stop_expiry(self) -> None:
        """It need not be ended for having waited too long any more."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None

    def stop_absence(self) -> None:
        """Nobody is waited for any more: a caller came back, or the job ends."""
        if self.absence is not None:
            self.absence.cancel()
            self.absence = None


@dataclass(frozen=True)
class EndedJob:
    """A job that ended, out of the store."""

    plan: Plan
    owner: str
    id: str
    log: EndedLog
    fingerprint: str
    created: datetime
    started: datetime | None
    attempts: int
    done_steps: int


@dataclass(frozen=True)
class DamagedJob:
    """A stored job of which nothing but this can be read."""

    id: str
    owner: str
    request_id: str | None
    created: datetime
    error: JobDamaged


AnyJob = Job | EndedJob
