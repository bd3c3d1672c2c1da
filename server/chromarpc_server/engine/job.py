"""A job: an admitted plan, its event log, and the one signal that goes back, the cancel flag."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

from chromarpc_server.domain.errors import ChromaError, JobDeadlineExceeded
from chromarpc_server.domain.plan import Plan
from chromarpc_server.engine.adapter_cache import AdapterFile
from chromarpc_server.engine.job_log import EndedLog, JobLog
from chromarpc_server.engine.model_cache import SetKey


class Cancellation:
    """Set from any thread, read by the device thread between steps. The first cause wins."""

    def __init__(self, deadline_at: float | None = None) -> None:
        """`deadline_at`: `time.monotonic()` at which the caller stops waiting; None if it never does."""
        self._deadline_at = deadline_at
        self._cause: ChromaError | None = None
        self._asked = threading.Event()
        self.requested_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked the job to stop."""
        return self._cause is not None

    @property
    def cause(self) -> ChromaError | None:
        """Why it is to stop, where it is."""
        return self._cause

    @property
    def deadline_at(self) -> float | None:
        """When its caller stops waiting, as `time.monotonic()` says it."""
        return self._deadline_at

    def cancel(self, cause: ChromaError) -> None:
        """Asks the job to stop because of `cause`."""
        if self._cause is None:
            self.requested_at = time.monotonic()
            self._cause = cause
            self._asked.set()

    def pause(self, seconds: float) -> None:
        """Waits so long, none if negative, or until the job is to stop; then `check`."""
        if self._deadline_at is not None:
            seconds = min(seconds, self._deadline_at - time.monotonic())
        if seconds > 0:
            self._asked.wait(seconds)
        self.check()

    def wait_longer(self, deadline_at: float | None) -> None:
        """Somebody else waits for the job too, until `deadline_at`, or without a deadline."""
        if self._deadline_at is not None:
            self._deadline_at = None if deadline_at is None else max(self._deadline_at, deadline_at)

    def check(self) -> None:
        """Raises the cause once the job is to stop, or JobDeadlineExceeded once the deadline has passed."""
        if self._cause is None and self._deadline_at is not None and time.monotonic() >= self._deadline_at:
            self.cancel(JobDeadlineExceeded("the deadline passed before the job was done"))
        if self._cause is not None:
            raise self._cause


@dataclass
class Job:
    """One admitted request on its way through the engine."""

    plan: Plan
    adapter_files: tuple[AdapterFile, ...]
    """Where each of the plan's adapters lies; never told to the client."""
    cancellation: Cancellation
    owner: str = ""
    """Name of the caller whose job it is; nobody else sees it."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    log: JobLog = field(default_factory=JobLog)
    admitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    position: int = 0
    """In the queue as last told to the client; 0 once it runs."""
    fingerprint: str = ""
    """Of the request, to tell the same one from another under one request id."""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: datetime | None = None
    """When it last began to run."""
    attempts: int = 0
    """How often it began to run, in earlier processes too."""
    attached: int = 0
    """Callers that hold on to it."""
    done_steps: int = 0
    pixel_steps_done: int = 0
    overtaken: int = 0
    """How many jobs ran first although it was this one's turn, because their weights were resident."""
    adapter_hashes: tuple[str | None, ...] = ()
    """SHA-256 of each adapter as an earlier process read it."""
    encodings: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    """Pictures that are being encoded and stored."""
    expiry: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Ends it when it has waited too long; a timer that is not needed any more would hold the job's pictures."""
    watchers: int = 0
    """Callers that look at it, without holding on to it."""
    absence: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Runs while the caller that it ends with is away and may come back; ends it then."""
    is_left: bool = False
    """Whether a caller has left it for good, so that nobody is waited for once the others have."""
    cancelled: ChromaError | None = None
    """Why it is to be stopped whichever process has it, once somebody was or will be told so."""

    @property
    def set_key(self) -> SetKey:
        """The prepared set it needs."""
        plan = self.plan
        return SetKey.of(plan.served_model, plan.profile, self.adapter_files, plan.loras, plan.trainer)


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


AnyJob = Job | EndedJob
