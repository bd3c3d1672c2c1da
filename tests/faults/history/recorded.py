"""The record of a run: what clients asked, what they were told, and which faults happened meanwhile.

All times are seconds on this process's monotonic clock: a call precedes another one if it ended before the
other began, and otherwise the two may have happened in either order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
ENDED = frozenset({SUCCEEDED, FAILED, CANCELLED})
END_EVENTS: Mapping[str, str] = {"completed": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
"""The last event of a job, and the state that it leaves the job in."""
MAKING = frozenset({"CreateJob", "Generate", "RedrawJob"})
"""The methods that make jobs."""
READING = frozenset({"GetJob", "ListJobs", "GetImage", "ListLoras", "InspectLora"})
"""The methods that write nothing."""

_NOTHING_DONE = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DATA_LOSS"}
)


@dataclass(frozen=True)
class Asked:
    """What a call asked for."""

    job_id: str = ""
    """The job that it is about; of `RedrawJob` the earlier one."""
    request_id: str = ""
    what: str = ""
    """What is to be drawn: equal texts, equal pixels. Empty where only the job tells, and in `RedrawJob`."""
    request: str = ""
    """The whole request: equal texts, the same request."""
    is_detached: bool = False
    after_sequence: int = 0
    omits_image_bytes: bool = False
    offset_bytes: int = 0
    deadline_s: float | None = None
    """Only where the client chose one that it expected to pass."""
    when_unattended: bool = False
    before: tuple[int, str] | None = None
    """Of a page: when the last job of the page before was accepted, in microseconds, and its id."""
    states: tuple[str, ...] = ()
    adapter: str = ""
    """SHA-256 of the adapter that is uploaded, deleted, inspected, or drawn with."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    status: str = "OK"
    reason: str = ""
    message: str = ""
    told_job: str = ""
    """The job that an error named."""
    is_cut: bool = False
    """Whether this side broke it off."""

    @property
    def is_ok(self) -> bool:
        """Whether it was acknowledged."""
        return self.status == "OK" and not self.is_cut

    @property
    def may_have_acted(self) -> bool:
        """Whether the server may have done what was asked, whatever it said."""
        return self.is_cut or self.status not in _NOTHING_DONE


@dataclass(frozen=True)
class JobView:
    """A job as an answer told it."""

    job_id: str
    request_id: str
    state: str
    created_us: int
    last_sequence: int
    plan: str
    """A hash of its plan."""
    images: tuple[str, ...]
    reason: str
    """Why it failed."""
    ending: str
    """Of a job that ended: a hash of how."""
    done_steps: int = 0

    @property
    def is_ended(self) -> bool:
        """Whether it has ended."""
        return self.state in ENDED

    @property
    def place(self) -> tuple[int, str]:
        """Where it is in lists, which begin with the greatest."""
        return self.created_us, self.job_id


@dataclass(frozen=True)
class SeenEvent:
    """An event as a stream told it."""

    sequence: int
    kind: str
    whole: str
    """A hash of the event; of `accepted`, which a restart repeats, without its time."""
    reason: str = ""
    message: str = ""

    @property
    def end_state(self) -> str:
        """The state in which it leaves the job, if it is an end; else empty."""
        return END_EVENTS.get(self.kind, "")


@dataclass(frozen=True)
class SeenImage:
    """Bytes of an image."""

    prompt_index: int
    sha256: str
    """Of the whole image, as its header says."""
    size_bytes: int
    offset_bytes: int
    data: bytes = field(repr=False)
    is_last: bool
    """Whether all bytes from the offset on were promised to be here."""


@dataclass(frozen=True)
class Call:
    """A call, with all that its client was told."""

    number: int
    client: str
    owner: str
    method: str
    begun_s: float
    ended_s: float
    asked: Asked
    outcome: Outcome
    job_id: str = ""
    """The job that it made, found or was about, as far as the answer says."""
    existed: bool | None = None
    """Of `CreateJob` and `RedrawJob`: whether the job was there already."""
    views: tuple[JobView, ...] = ()
    events: tuple[SeenEvent, ...] = ()
    images: tuple[SeenImage, ...] = ()
    plan: str = ""
    """A hash of the plan that `accepted` told."""
    is_last_page: bool = False
    adapters: tuple[str, ...] = ()
    """SHA-256 of the adapters that it showed."""

    @property
    def end_state(self) -> str:
        """The end that its stream told, if any."""
        return self.events[-1].end_state if self.events else ""

    def described(self) -> str:
        """One line for people."""
        asked = {name: value for name, value in vars(self.asked).items() if value not in ("", False, 0, None, ())}
        told: list[str] = [view.state for view in self.views if view.job_id == (self.job_id or self.asked.job_id)]
        if self.method in MAKING and self.job_id:
            told.append(f"job {self.job_id}")
        told += [f"{event.sequence} {event.kind}" for event in self.events[:2] + self.events[2:][-2:]]
        outcome = self.outcome
        ending = "cut" if outcome.is_cut else " ".join(filter(None, (outcome.status, outcome.reason)))
        names = ", ".join(f"{name}={value}" for name, value in asked.items())
        return (
            f"#{self.number} {self.begun_s:.3f}–{self.ended_s:.3f} {self.client} {self.method}({names}) → {ending}"
            + (f": {', '.join(told)}" if told else "")
        )


@dataclass(frozen=True)
class Fault:
    """Something that happened to the server."""

    kind: str
    begun_s: float
    ended_s: float
    """Once the server was ready again, or was given up."""
    is_ready: bool = True
    """Whether it was ready again in time."""
    exit_code: int | None = None
    """Of a process that was asked to end; None where none was, or it had to be killed."""
    hung: bool = False
    """Whether a process that was asked to end did not."""
    damaged: str = ""
    """SHA-256 of what was damaged."""
    detail: str = ""

    def described(self) -> str:
        """One line for people."""
        return f"{self.begun_s:.3f}–{self.ended_s:.3f} {self.kind} {self.detail}".rstrip()


@dataclass(frozen=True)
class History:
    """All of a run."""

    calls: tuple[Call, ...]
    faults: tuple[Fault, ...] = ()
    max_attempts: int = 2
    """How often a job is begun when the server dies while it runs."""
    is_settled: bool = False
    """Whether every job was given the time to end, and was looked at in the end."""


class Recorder:
    """Takes in what happens, on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._faults: list[Fault] = []
        self._number = 0
        self._open: dict[int, Call] = {}
        self._data: dict[bytes, bytes] = {}

    def begin(self, client: str, owner: str, method: str, asked: Asked) -> Call:
        """A call begins. Until it ends it counts as one whose outcome is not known."""
        with self._lock:
            self._number += 1
            now_s = time.monotonic()
            unknown = Outcome("UNKNOWN", is_cut=True)
            call = Call(self._number, client, owner, method, now_s, now_s, asked, unknown)
            self._open[call.number] = call
            return call

    def one_of(self, data: bytes) -> bytes:
        """The same bytes, kept once."""
        with self._lock:
            return self._data.setdefault(data, data)

    def end(self, call: Call) -> None:
        """A call ended, and this came of it."""
        with self._lock:
            del self._open[call.number]
            self._calls.append(call)

    def fault(self, fault: Fault) -> None:
        """A fault is over."""
        with self._lock:
            self._faults.append(fault)

    def history(self, *, max_attempts: int, is_settled: bool = False) -> History:
        """Everything so far, calls in the order in which they began."""
        with self._lock:
            now_s = time.monotonic()
            calls = self._calls + [replace(call, ended_s=now_s) for call in self._open.values()]
            calls.sort(key=lambda call: call.number)
            return History(tuple(calls), tuple(self._faults), max_attempts, is_settled)
