"""Histories made by hand, for tests of the judge."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from tests.faults.history.judge import judge
from tests.faults.history.recorded import (
    Asked,
    Call,
    Fault,
    History,
    JobView,
    Outcome,
    SeenEvent,
    SeenImage,
)

CUT = Outcome("CANCELLED", is_cut=True)
NOT_FOUND = Outcome("NOT_FOUND", "JOB_NOT_FOUND")
AWAY = Outcome("UNAVAILABLE")
KILL = Fault("kill", 0.0, 1000.0)
IMAGE = b"an image"
SHA256 = hashlib.sha256(IMAGE).hexdigest()


class Made:
    """A history, made call by call; each begins after the one before ended, unless it is said to be beside it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._times = itertools.count(1)

    def call(self, method: str, *, owner: str = "alice", beside: float | None = None, **told: Any) -> Call:
        begun_s, ended_s = float(next(self._times)), float(next(self._times))
        asked = told.pop("asked", Asked())
        told.setdefault("job_id", "" if method == "RedrawJob" else asked.job_id)
        call = Call(
            number=len(self.calls) + 1,
            client=f"{owner}-0",
            owner=owner,
            method=method,
            begun_s=begun_s if beside is None else beside,
            ended_s=ended_s,
            asked=asked,
            outcome=told.pop("outcome", Outcome()),
            **told,
        )
        self.calls.append(call)
        return call

    def create(self, job_id: str = "j", **told: Any) -> Call:
        asked = told.pop("asked", Asked(what="w", request="w", is_detached=True))
        view = told.pop("view", job(job_id, request_id=asked.request_id))
        told.setdefault("existed", False)
        return self.call("CreateJob", asked=asked, job_id=job_id, views=(view,), plan="p", **told)

    def redraw(self, new_id: str, job_id: str = "j", *, request_id: str = "", **told: Any) -> Call:
        asked = Asked(job_id=job_id, request_id=request_id, request=f"redraw {job_id}", is_detached=True)
        view = told.pop("view", job(new_id, request_id=request_id))
        told.setdefault("existed", False)
        return self.call("RedrawJob", asked=asked, job_id=new_id, views=(view,), plan=view.plan, **told)

    def about(self, method: str, job_id: str = "j", **told: Any) -> Call:
        return self.call(method, asked=Asked(job_id=job_id), **told)

    def get(self, view: JobView, **told: Any) -> Call:
        return self.about("GetJob", view.job_id, views=(view,), **told)

    def watch(self, events: Sequence[SeenEvent], after: int = 0, **told: Any) -> Call:
        asked = Asked(job_id="j", after_sequence=after, omits_image_bytes=True)
        return self.call("WatchJob", asked=asked, events=tuple(events), **told)

    def rules(self, *faults: Fault, is_settled: bool = False) -> set[str]:
        history = History(tuple(self.calls), faults, max_attempts=2, is_settled=is_settled)
        return {problem.rule for problem in judge(history)}


def job(job_id: str = "j", state: str = "queued", **told: Any) -> JobView:
    values: dict[str, Any] = {
        "request_id": "",
        "created_us": 1,
        "last_sequence": 1,
        "plan": "p",
        "images": (),
        "reason": "",
    }
    values |= {"ending": state} | told
    return JobView(job_id=job_id, state=state, **values)


def event(sequence: int, kind: str, whole: str = "", **told: Any) -> SeenEvent:
    return SeenEvent(sequence, kind, whole or f"{sequence} {kind}", **told)


def under(request_id: str = "r", request: str = "w") -> Asked:
    return Asked(request_id=request_id, what=request, request=request, is_detached=True)


def image(data: bytes = IMAGE, offset: int = 0, *, sha256: str = SHA256, is_last: bool = True) -> SeenImage:
    return SeenImage(0, sha256, len(IMAGE), offset, data, is_last)
