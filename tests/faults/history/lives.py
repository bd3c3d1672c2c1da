"""Rules of a job's life: it is kept until it is deleted, ends once, and its events are numbered once."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.history.index import FULLS, KILLS, STORE_RECOVERY_S, Index, JobRecord
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import CANCELLED, FAILED, MAKING, SUCCEEDED, Call


def kept(index: Index) -> Iterator[Problem]:
    """A job that was told is there for as long as nobody can have deleted it."""
    for record in index.jobs.values():
        for call in record.missing:
            if record.told_s < call.begun_s and not record.may_be_deleted(call.ended_s):
                text = "the job was told, nobody deleted it, and it is gone"
                yield Problem("lost", text, record.job_id, (call.number,))
                break


def stays_deleted(index: Index) -> Iterator[Problem]:
    """A job that was deleted, or missing once, is never seen again."""
    for record in index.jobs.values():
        deleted = [call for call in record.deletes if call.outcome.is_ok]
        gone = deleted + [call for call in record.missing if record.told_s < call.begun_s]
        if not gone:
            continue
        first = min(gone, key=lambda call: call.ended_s)
        for call in record.shown:
            if first.ended_s < call.begun_s:
                text = "the job was deleted" if first in deleted else "the job was missing"
                yield Problem("revived", f"{text} and came back", record.job_id, (first.number, call.number))
                break


def ends_once(index: Index) -> Iterator[Problem]:
    """Once an end was seen, all answers tell that end."""
    for record in index.jobs.values():
        yield from _one_ending(record)
        yield from _never_undone(record)


def _one_ending(record: JobRecord) -> Iterator[Problem]:
    events = {
        (call.end_state, call.events[-1].sequence, call.events[-1].whole): call
        for call in record.streams()
        if call.end_state
    }
    views = {view.ending: (call, view) for call, view in record.seen if view.is_ended}
    plain = {(state, sequence): call.number for (state, sequence, _), call in events.items()}
    plain |= {(view.state, view.last_sequence): call.number for call, view in views.values()}
    if len(events) > 1 or len(views) > 1 or len(plain) > 1:
        told = ", ".join(f"{state} at {sequence}" for state, sequence in sorted(plain))
        numbers = {call.number for call in events.values()} | {call.number for call, _ in views.values()}
        yield Problem("one_end", f"its end was told in different ways: {told}", record.job_id, tuple(numbers))


def _never_undone(record: JobRecord) -> Iterator[Problem]:
    ended = [call for call in record.streams() if call.end_state]
    ended += [call for call, view in record.seen if view.is_ended]
    if not ended:
        return
    first = min(ended, key=lambda call: call.ended_s)
    for call, view in record.seen:
        if first.ended_s < call.begun_s and not view.is_ended:
            text = f"it had ended, and is {view.state} again"
            yield Problem("one_end", text, record.job_id, (first.number, call.number))
            return


def cancel_holds(index: Index) -> Iterator[Problem]:
    """A cancel that was acknowledged before the job's end is the job's end."""
    for record in index.jobs.values():
        ends = _end_states(record)
        for call in record.cancels:
            states = [view.state for view in call.views if view.job_id == record.job_id]
            if not call.outcome.is_ok or call.asked.when_unattended or not states:
                continue
            if states[0] not in (SUCCEEDED, FAILED) and ends - {CANCELLED}:
                text = f"its cancel was acknowledged while it was {states[0]}, and it {', '.join(sorted(ends))}"
                yield Problem("cancel", text, record.job_id, (call.number,))
                break


def cancelled_for_a_reason(index: Index) -> Iterator[Problem]:
    """Where nobody holds on to a job, and nobody cancels it, it is not cancelled."""
    for record in index.jobs.values():
        if CANCELLED not in _end_states(record):
            continue
        made = index.made[record.owner, record.request_id]
        if not record.request_id:
            made = [call for call in record.shown if call.job_id == record.job_id]
        makers = [call for call in made if call.method in MAKING]
        # Of a call whose outcome is not known it is not known either which job it made.
        detached = bool(makers) and all(
            call.asked.is_detached and call.asked.deadline_s is None for call in makers
        )
        asked = any(not call.asked.when_unattended for call in record.cancels)
        if detached and not asked:
            yield Problem("unasked_cancel", "it was cancelled, and nobody had asked for that", record.job_id)


def _end_states(record: JobRecord) -> set[str]:
    states = {call.end_state for call in record.streams()}
    return (states | {view.state for _, view in record.seen if view.is_ended}) - {""}


_STORE_REASONS = frozenset({"STORE_UNAVAILABLE", "DISK_FULL"})
"""Of jobs whose images could not be stored. One that waits does so until there is room."""


def fails_for_a_reason(index: Index) -> Iterator[Problem]:
    """A job fails only for what happened."""
    for record in index.jobs.values():
        for call, view in record.seen:
            if view.reason in _STORE_REASONS and not view.done_steps:
                text = f"it failed with {view.reason} before it had drawn anything"
                yield Problem("failure", text, record.job_id, (call.number,))
        reasons = {view.reason: call for call, view in record.seen if view.state == FAILED}
        reasons |= {call.events[-1].reason: call for call in record.streams() if call.end_state == FAILED}
        for reason, call in reasons.items():
            if not _may_fail(index, record, reason, call):
                text = f"it failed with {reason}, for which nothing gave a reason"
                yield Problem("failure", text, record.job_id, (call.number,))


def _may_fail(index: Index, record: JobRecord, reason: str, call: Call) -> bool:
    adapters = {index.adapter(made) for made in index.made[record.owner, record.request_id]} - {""}
    faults = [
        fault
        for fault in index.history.faults
        if fault.begun_s < call.ended_s and record.begun_s < fault.ended_s + STORE_RECOVERY_S
    ]
    match reason:
        case "ATTEMPTS_EXHAUSTED":
            kills = [fault for fault in faults if fault.kind in KILLS and fault.ended_s > record.begun_s]
            return len(kills) >= index.history.max_attempts
        case "STORE_UNAVAILABLE" | "DISK_FULL":
            return any(fault.kind in FULLS for fault in faults)
        case "LORA_CHANGED" | "LORA_NOT_FOUND":
            return any(
                other.method == "DeleteLora" and other.owner == record.owner and other.asked.adapter in adapters
                for other in index.history.calls
            )
        case "LORA_DAMAGED":
            return any(fault.damaged in adapters for fault in index.history.faults if fault.damaged)
        case _:
            return False


def numbered_once(index: Index) -> Iterator[Problem]:
    """Sequences rise, within a stream and from one to the next; the same one is the same event."""
    for call in index.history.calls:
        yield from _rises(call)
    for record in index.jobs.values():
        yield from _same_events(record)
        yield from _never_falls(record)


def _rises(call: Call) -> Iterator[Problem]:
    sequence = call.asked.after_sequence
    for event in call.events:
        is_right = event.sequence == sequence if event.kind == "heartbeat" else event.sequence > sequence
        if not is_right:
            text = f"in a stream {event.sequence} {event.kind} comes after {sequence}"
            yield Problem("sequence", text, call.job_id, (call.number,))
            return
        sequence = event.sequence
    if call.method == "WatchJob" and call.outcome.reason == "INVALID_PARAMETER":
        text = f"{call.asked.after_sequence} was told, and is refused as not come to yet"
        yield Problem("sequence", text, call.job_id, (call.number,))


def _same_events(record: JobRecord) -> Iterator[Problem]:
    known: dict[int, tuple[str, int]] = {}
    last, end, end_call = 0, 0, 0
    for call in record.streams():
        for event in call.events:
            if event.kind == "heartbeat":
                continue
            before, number = known.setdefault(event.sequence, (event.whole, call.number))
            if before != event.whole:
                text = f"{event.sequence} is {event.kind} here, and was another event before"
                yield Problem("sequence", text, record.job_id, (number, call.number))
                return
            last = max(last, event.sequence)
            if event.end_state:
                end, end_call = event.sequence, call.number
    if end and last > end:
        yield Problem("sequence", f"{last} comes after the end, which is {end}", record.job_id, (end_call,))


def _never_falls(record: JobRecord) -> Iterator[Problem]:
    told = [(call, view.last_sequence) for call, view in record.seen]
    told += [(call, max(event.sequence for event in call.events)) for call in record.streams()]
    told.sort(key=lambda one: one[0].ended_s)
    floor, floor_call, position = 0, 0, 0
    for call, view in sorted(record.seen, key=lambda one: one[0].begun_s):
        while position < len(told) and told[position][0].ended_s < call.begun_s:
            if told[position][1] > floor:
                floor, floor_call = told[position][1], told[position][0].number
            position += 1
        if view.last_sequence < floor:
            text = f"its last event was {floor}, and is {view.last_sequence}"
            yield Problem("sequence", text, record.job_id, (floor_call, call.number))
            return


def settled(index: Index) -> Iterator[Problem]:
    """In the end, every job that was not deleted has ended."""
    if not index.history.is_settled:
        return
    for record in index.jobs.values():
        if not record.deletes and not _end_states(record):
            yield Problem("unsettled", "it never ended", record.job_id)


LIFE_RULES = (
    kept,
    stays_deleted,
    ends_once,
    cancel_holds,
    cancelled_for_a_reason,
    fails_for_a_reason,
    numbered_once,
    settled,
)
