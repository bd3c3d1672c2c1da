"""A history by jobs: which calls showed one, missed one, made one, or may have ended or deleted one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.history.recorded import MAKING, Call, Fault, History, JobView

_FOUND_ALL_THE_SAME = frozenset({"JOB_NOT_ENDED", "IMAGE_NOT_FOUND", "IMAGE_DAMAGED", "JOB_DAMAGED"})
"""Refusals that say that the job is there."""
_OF_EARLIER_JOB = frozenset({"NOT_KEPT", "LORA_NOT_FOUND", "LORA_CHANGED", "LORA_DAMAGED"})
"""Refusals of `RedrawJob` that come of what is stored of the earlier job."""
_AWAY_S = 2.0
"""How long after a fault a client may still find that it has no connection."""
STORE_RECOVERY_S = 45.0
"""How long after a full disk the store may still refuse: ends that were not stored are tried every 30 s."""
KILLS = frozenset({"kill", "kill_in_start", "kill_in_drain", "kill_when_full"})
FULLS = frozenset({"full", "kill_when_full", "term_when_full"})


@dataclass
class JobRecord:
    """All calls that concern one job, each list in the order in which they began."""

    job_id: str
    owner: str
    shown: list[Call] = field(default_factory=list)
    """Those whose answer says that it was there."""
    missing: list[Call] = field(default_factory=list)
    """Those whose answer says that it was not, although it had been told before."""
    deletes: list[Call] = field(default_factory=list)
    """Those of its owner that may have deleted it."""
    cancels: list[Call] = field(default_factory=list)
    """Those of its owner that may have cancelled it."""
    seen: list[tuple[Call, JobView]] = field(default_factory=list)
    """It, as answers told it."""
    created_us: int | None = None
    request_id: str = ""

    @property
    def told_s(self) -> float:
        """When a client knew of it for certain."""
        return min(call.ended_s for call in self.shown)

    @property
    def begun_s(self) -> float:
        """When it may have been made at the earliest, as far as it is known."""
        return min(call.begun_s for call in self.shown)

    def streams(self) -> Iterator[Call]:
        """Calls that told its events."""
        return (call for call in self.shown if call.events and call.job_id == self.job_id)

    def may_be_deleted(self, by_s: float) -> bool:
        """Whether it may have been deleted at a time."""
        return any(call.begun_s < by_s for call in self.deletes)


class Index:
    """The history, indexed once for all rules."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.jobs: dict[str, JobRecord] = {}
        self.made: dict[tuple[str, str], list[Call]] = defaultdict(list)
        """Calls of one owner that ask for a job under one request id, or under none."""
        self.owner_of_making: dict[str, str] = {}
        self._by_request: dict[tuple[str, str], list[JobRecord]] = defaultdict(list)
        self._making: dict[str, Call] = {}
        """By job: a call that made or found it, as the one that asks for what it draws."""
        for call in history.calls:
            if call.method in MAKING:
                self.made[call.owner, call.asked.request_id].append(call)
                if call.job_id:
                    self.owner_of_making.setdefault(call.job_id, call.owner)
                    self._making.setdefault(call.job_id, call)
        for call in history.calls:
            for job_id in shown(call):
                self._record(job_id, call.owner).shown.append(call)
            for view in call.views:
                record = self.jobs[view.job_id]
                record.seen.append((call, view))
                record.created_us, record.request_id = view.created_us, view.request_id
        self._add_rest()

    def _record(self, job_id: str, owner: str) -> JobRecord:
        record = self.jobs.get(job_id)
        if record is None:
            record = self.jobs[job_id] = JobRecord(job_id, self.owner_of_making.get(job_id, owner))
        return record

    def _add_rest(self) -> None:
        for record in self.jobs.values():
            for call in record.shown:
                if call.method in MAKING and record.job_id in (call.job_id, call.outcome.told_job):
                    record.request_id = record.request_id or call.asked.request_id
            if record.request_id:
                self._by_request[record.owner, record.request_id].append(record)
        for call in self.history.calls:
            named = self.jobs.get(call.asked.job_id)
            own: Sequence[JobRecord] = [named] if named is not None and named.owner == call.owner else []
            if call.method == "CancelJob" and call.asked.request_id:
                own = self.under(call.owner, call.asked.request_id)
            for record in own:
                if call.outcome.reason == "JOB_NOT_FOUND" and call.asked.job_id and not call.events:
                    record.missing.append(call)
                if call.method == "DeleteJob" and call.outcome.may_have_acted:
                    record.deletes.append(call)
                if call.method == "CancelJob" and call.outcome.may_have_acted:
                    record.cancels.append(call)
        for call, job_id in self._missed_in_lists():
            self.jobs[job_id].missing.append(call)

    def _missed_in_lists(self) -> Iterator[tuple[Call, str]]:
        """Jobs that a page should have had, and had not."""
        places: dict[str, list[tuple[tuple[int, str], float]]] = defaultdict(list)
        for record in self.jobs.values():
            if record.created_us is not None:
                told_s = min(call.ended_s for call, _ in record.seen)
                places[record.owner].append(((record.created_us, record.job_id), told_s))
        for jobs in places.values():
            jobs.sort()
        for call in self.history.calls:
            if call.method != "ListJobs" or not call.outcome.is_ok or call.asked.states:
                continue
            jobs = places[call.owner]
            keys = [place for place, _ in jobs] if len(jobs) < 64 else _Keys(jobs)
            low = 0
            if not call.is_last_page and call.views:
                low = bisect_right(keys, call.views[-1].place)
            high = len(jobs) if call.asked.before is None else bisect_left(keys, call.asked.before)
            here = {view.job_id for view in call.views}
            for (_, job_id), told_s in jobs[low:high]:
                if told_s < call.begun_s and job_id not in here:
                    yield call, job_id

    def under(self, owner: str, request_id: str) -> Sequence[JobRecord]:
        """Jobs of an owner that were made under a request id."""
        return self._by_request.get((owner, request_id), ()) if request_id else ()

    def first_drawn(self, job_id: str) -> str:
        """The job that this one draws again, or itself."""
        while (call := self._making.get(job_id)) is not None and call.method == "RedrawJob":
            job_id = call.asked.job_id
        return job_id

    def what(self, job_id: str) -> str:
        """What a job draws, the same for all that draw the same."""
        first = self.first_drawn(job_id)
        call = self._making.get(first)
        return call.asked.what if call is not None and call.asked.what else f"what job {first} drew first"

    def adapter(self, call: Call) -> str:
        """The adapter of the job that a call makes, as far as it is known."""
        if call.method != "RedrawJob":
            return call.asked.adapter
        first = self._making.get(self.first_drawn(call.asked.job_id))
        return "" if first is None else first.asked.adapter

    def disturbances(self, call: Call, slack_s: float = _AWAY_S) -> Iterator[Fault]:
        """Faults beside which a call was made, or shortly after which."""
        for fault in self.history.faults:
            if fault.begun_s <= call.ended_s and call.begun_s <= fault.ended_s + slack_s:
                yield fault


class _Keys:
    """The places of a sorted list of jobs, without a copy."""

    def __init__(self, jobs: list[tuple[tuple[int, str], float]]) -> None:
        self._jobs = jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return self._jobs[index][0]


def shown(call: Call) -> set[str]:
    """Jobs that were there, says the call's answer."""
    found = {view.job_id for view in call.views}
    if call.job_id and (call.events or call.images):
        found.add(call.job_id)
    if call.method in ("WatchJob", "GetImage", "DeleteJob") and call.outcome.is_ok:
        found.add(call.asked.job_id)
    if call.outcome.reason in _FOUND_ALL_THE_SAME and call.asked.job_id:
        found.add(call.asked.job_id)
    if call.method == "RedrawJob" and (call.existed is False or call.outcome.reason in _OF_EARLIER_JOB):
        found.add(call.asked.job_id)
    if call.method == "WatchJob" and call.outcome.reason == "INVALID_PARAMETER":
        found.add(call.asked.job_id)
    if call.outcome.told_job:
        found.add(call.outcome.told_job)
    return found
