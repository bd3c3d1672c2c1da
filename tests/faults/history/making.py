"""Rules of making jobs: one for a request id, none from nothing, and nobody sees another's."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from tests.faults.history.index import Index, JobRecord
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import CANCELLED, MAKING, Call


def one_job_for_a_request_id(index: Index) -> Iterator[Problem]:
    """Of one owner, unless the first was deleted, or given up because its caller stayed away."""
    by_id: dict[tuple[str, str], list[JobRecord]] = defaultdict(list)
    for record in index.jobs.values():
        if record.request_id:
            by_id[record.owner, record.request_id].append(record)
    for (owner, request_id), records in by_id.items():
        records.sort(key=_when_made(records))
        for first, second in itertools.pairwise(records):
            # Where nothing tells the order in which they were made, the one that is seen later may have been the
            # first, and given up.
            overlap = second.shown[0].begun_s < first.shown[0].ended_s
            is_given_up = _may_be_given_up(index, first) or (overlap and _may_be_given_up(index, second))
            if not first.may_be_deleted(second.told_s) and not is_given_up:
                numbers = (first.shown[0].number, second.shown[0].number)
                text = f"{owner}'s request id {request_id} made it, and had made {first.job_id}"
                yield Problem("doubled", text, second.job_id, numbers)


def _when_made(records: Iterable[JobRecord]) -> Callable[[JobRecord], float]:
    """Tells jobs apart by when they were accepted, if all of them told that, else by when clients knew of them.

    A job that was given up before a client knew of it is often seen only after the one that came in its place.
    """
    created = {record.job_id: record.created_us for record in records}
    if None in created.values():
        return lambda record: record.told_s
    return lambda record: created[record.job_id] or 0


def _may_be_given_up(index: Index, record: JobRecord) -> bool:
    ends = {view.state for _, view in record.seen if view.is_ended}
    ends |= {call.end_state for call in record.streams()} - {""}
    calls = index.made[record.owner, record.request_id]
    has_caller = any(call.method == "Generate" and not call.asked.is_detached for call in calls)
    return ends <= {CANCELLED} and (has_caller or any(call.asked.when_unattended for call in record.cancels))


def made_once(index: Index) -> Iterator[Problem]:
    """A job is told as new once, and only before it was known."""
    for record in index.jobs.values():
        new = [call for call in record.shown if call.existed is False and call.job_id == record.job_id]
        for call in new:
            if len(new) > 1 or record.told_s < call.begun_s:
                text = "it was told as new although it was known"
                yield Problem("doubled", text, record.job_id, (call.number,))
                break
        without_id = [
            call
            for call in record.shown
            if call.method in MAKING and call.job_id == record.job_id and not call.asked.request_id
        ]
        if len(without_id) > 1:
            numbers = tuple(call.number for call in without_id)
            yield Problem("doubled", "two calls without a request id got one job", record.job_id, numbers)


def made_by_somebody(index: Index) -> Iterator[Problem]:
    """There is no job that no call can have made."""
    explained = {key: {call.job_id for call in calls} for key, calls in index.made.items()}
    unexplained: dict[str, list[JobRecord]] = defaultdict(list)
    for record in index.jobs.values():
        calls = index.made[record.owner, record.request_id]
        if record.job_id in explained.get((record.owner, record.request_id), ()):
            continue
        if not record.request_id:
            unexplained[record.owner].append(record)
        elif not any(call.outcome.may_have_acted for call in calls):
            yield Problem("doubled", "no call can have made it", record.job_id, (record.shown[0].number,))
    for owner, records in unexplained.items():
        unknown = [call for call in index.made[owner, ""] if not call.job_id and call.outcome.may_have_acted]
        if len(records) > len(unknown):
            text = f"{owner} has {len(records)} jobs from {len(unknown)} calls of unknown outcome"
            yield Problem("doubled", text, records[-1].job_id, (records[-1].shown[0].number,))


def one_request_for_an_id(index: Index) -> Iterator[Problem]:
    """Another request under an id is refused, naming the first one's job; the same one never is."""
    for (_, request_id), calls in index.made.items():
        if not request_id:
            continue
        requests: dict[str, tuple[str, int]] = {}
        for call in calls:
            if call.job_id:
                known, number = requests.setdefault(call.job_id, (call.asked.request, call.number))
                if known != call.asked.request:
                    text = "another request under its request id was given it"
                    yield Problem("request_id", text, call.job_id, (number, call.number))
        for call in calls:
            if call.outcome.reason == "REQUEST_ID_REUSED":
                yield from _is_right_refusal(call, calls, requests)


def _is_right_refusal(call: Call, calls: list[Call], requests: dict[str, tuple[str, int]]) -> Iterator[Problem]:
    others = [
        other
        for other in calls
        if other.asked.request != call.asked.request
        and other.begun_s < call.ended_s
        and (other.job_id or other.outcome.may_have_acted)
    ]
    if not others:
        text = f"{call.asked.request_id} is refused as another request's, and there is none"
        yield Problem("request_id", text, "", (call.number,))
    told = call.outcome.told_job
    if requests.get(told, ("", 0))[0] == call.asked.request:
        text = "the same request is refused as another one"
        yield Problem("request_id", text, told, (requests[told][1], call.number))


def nobody_sees_anothers(index: Index) -> Iterator[Problem]:
    """A job is shown to its owner alone."""
    for record in index.jobs.values():
        for call in record.shown:
            if call.owner != record.owner:
                text = f"{call.owner} sees it with {call.method}, and it is {record.owner}'s"
                yield Problem("foreign", text, record.job_id, (call.number,))
                break


MAKING_RULES = (
    one_job_for_a_request_id,
    made_once,
    made_by_somebody,
    one_request_for_an_id,
    nobody_sees_anothers,
)
