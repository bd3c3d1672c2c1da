"""Rules of single answers: images are what their hashes say, lists in order, and errors have a cause."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from tests.faults.history.index import FULLS, STORE_RECOVERY_S, Index, JobRecord
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import MAKING, READING, SUCCEEDED, Call, Fault

_MAKING_REASONS = frozenset({"REQUEST_ID_REUSED", "QUEUE_FULL", "QUOTA_EXCEEDED", "LORA_NOT_FOUND"})
_END_REASONS = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "ATTEMPTS_EXHAUSTED", "LORA_CHANGED"})
"""What `Generate` ends with where its job does; `fails_for_a_reason` looks at why."""
_REASONS: dict[str, frozenset[str]] = {
    "CreateJob": _MAKING_REASONS,
    "Generate": _MAKING_REASONS | _END_REASONS,
    "WatchJob": frozenset({"JOB_NOT_FOUND"}),
    "GetJob": frozenset({"JOB_NOT_FOUND"}),
    "ListJobs": frozenset(),
    "CancelJob": frozenset({"JOB_NOT_FOUND"}),
    "DeleteJob": frozenset({"JOB_NOT_FOUND", "JOB_NOT_ENDED"}),
    "GetImage": frozenset({"JOB_NOT_FOUND", "IMAGE_NOT_FOUND"}),
    "RedrawJob": _MAKING_REASONS | {"JOB_NOT_FOUND", "JOB_NOT_ENDED", "LORA_CHANGED"},
    "UploadLora": frozenset({"UPLOAD_NOT_FOUND", "UPLOADS_FULL"}),
    "DeleteLora": frozenset({"LORA_NOT_FOUND"}),
    "ListLoras": frozenset(),
    "InspectLora": frozenset({"LORA_NOT_FOUND"}),
}
"""What each method may be refused with at any time."""
_LEAVE_SERVER = frozenset({"stop", "full", "flip_image", "flip_upload"})
"""Faults that end neither the process nor its connections."""


def images_are_their_hash(index: Index) -> Iterator[Problem]:
    """Bytes are those that their header's hash names, from the first to the last."""
    hashes: dict[bytes, str] = {}
    contents: dict[str, bytes] = {}
    seen = [(call, image) for call in index.history.calls for image in call.images]
    for _, image in seen:
        if image.data not in hashes:
            hashes[image.data] = hashlib.sha256(image.data).hexdigest()
        contents[hashes[image.data]] = image.data
    for call, image in seen:
        promised = image.size_bytes - image.offset_bytes
        whole = contents.get(image.sha256)
        is_short = image.is_last and len(image.data) != promised
        is_whole = image.is_last and not image.offset_bytes
        is_other = is_whole and hashes[image.data] != image.sha256
        if whole is not None and not is_other:
            is_other = whole[image.offset_bytes :][: len(image.data)] != image.data
        if is_short or is_other or len(image.data) > promised:
            what = "not all of the bytes" if is_short and not is_other else "other bytes than those"
            text = f"{what} of {image.sha256[:12]} were served by {call.method}"
            yield Problem("bytes", text, call.job_id, (call.number,))


def equal_plans_equal_pixels(index: Index) -> Iterator[Problem]:
    """Jobs that draw the same draw the same bytes, before and after any fault; so does one that is drawn again."""
    drawn: dict[str, tuple[str, int]] = {}
    plans: dict[str, tuple[str, int]] = {}
    for record in index.jobs.values():
        what = index.what(record.job_id)
        for told, number in _plans(record):
            plan, first = plans.setdefault(what, (told, number))
            if plan != told:
                yield Problem(
                    "plan", f"another plan than before is made of {what}", record.job_id, (first, number)
                )
        for sha256, number in _images(record):
            known, first = drawn.setdefault(what, (sha256, number))
            if known != sha256:
                text = f"{what} gave {known[:12]} once, and {sha256[:12]} here"
                yield Problem("pixels", text, record.job_id, (first, number))


def _plans(record: JobRecord) -> Iterator[tuple[str, int]]:
    for call in record.shown:
        if call.plan and call.job_id == record.job_id:
            yield call.plan, call.number
    for call, view in record.seen:
        yield view.plan, call.number


def _images(record: JobRecord) -> Iterator[tuple[str, int]]:
    for call in record.shown:
        if call.job_id == record.job_id:
            yield from ((image.sha256, call.number) for image in call.images)
    for call, view in record.seen:
        yield from ((sha256, call.number) for sha256 in view.images)


def one_plan_a_job(index: Index) -> Iterator[Problem]:
    """What a job draws, and when it was accepted, never changes."""
    for record in index.jobs.values():
        plans = {call.plan: call.number for call in record.streams() if call.plan}
        plans |= {view.plan: call.number for call, view in record.seen}
        created = {view.created_us: call.number for call, view in record.seen}
        if len(plans) > 1 or len(created) > 1:
            numbers = (*plans.values(), *created.values())
            yield Problem("plan", "its plan, or when it was accepted, changed", record.job_id, numbers)


def lists_are_in_order(index: Index) -> Iterator[Problem]:
    """Newest first, each once, and only what was asked for."""
    for call in index.history.calls:
        if call.method != "ListJobs":
            continue
        places = [view.place for view in call.views]
        is_sorted = all(first > second for first, second in itertools.pairwise(places))
        goes_on = call.asked.before is None or all(place < call.asked.before for place in places)
        if not is_sorted or not goes_on:
            yield Problem("list", f"the list of call {call.number} is not in order", "", (call.number,))
        if call.asked.states and any(view.state not in call.asked.states for view in call.views):
            yield Problem("list", f"the list of call {call.number} has other states", "", (call.number,))


def streams_are_whole(index: Index) -> Iterator[Problem]:
    """A stream that ends well has told the end, and begins where it was asked to."""
    for call in index.history.calls:
        if call.method not in ("Generate", "WatchJob"):
            continue
        kinds = [event.kind for event in call.events]
        if kinds and not call.asked.after_sequence and kinds[0] != "accepted":
            yield Problem("stream", f"a stream begins with {kinds[0]}", call.job_id, (call.number,))
        has_end = bool(call.end_state)
        needs_end = call.method == "Generate" or bool(kinds)
        if call.outcome.is_ok and needs_end and not has_end:
            yield Problem("stream", "a stream ended well without an end", call.job_id, (call.number,))
        if call.method == "Generate" and call.outcome.is_ok and kinds and kinds[-1] != "completed":
            yield Problem("stream", f"Generate answers OK to {kinds[-1]}", call.job_id, (call.number,))
        is_whole = call.outcome.is_ok and kinds and kinds[-1] == "completed" and not call.asked.after_sequence
        if is_whole and not call.images:
            yield Problem("stream", "a completed stream has no image", call.job_id, (call.number,))


def errors_have_a_cause(index: Index) -> Iterator[Problem]:
    """A call fails only for what was asked or what happened."""
    for call in index.history.calls:
        outcome = call.outcome
        if outcome.status == "OK" or outcome.is_cut or outcome.reason in _REASONS[call.method]:
            continue
        if not any(is_cause(index, call) for is_cause in _CAUSES):
            text = f"{call.method} failed with {outcome.status} {outcome.reason}: {outcome.message}"
            yield Problem("status", text, call.job_id, (call.number,))


def _is_disturbed(index: Index, call: Call) -> bool:
    status, reason = call.outcome.status, call.outcome.reason
    kinds = {fault.kind for fault in index.disturbances(call)}
    match status, reason:
        case "UNAVAILABLE", "STORE_UNAVAILABLE":
            # What is stored can be read on a full disk too.
            return call.method not in READING and _is_out_of_room(index, call)
        case "RESOURCE_EXHAUSTED", "DISK_FULL":
            return call.method not in READING and _is_out_of_room(index, call)
        case "RESOURCE_EXHAUSTED", "":
            return False
        case "UNAVAILABLE", ("" | "DRAINING"):
            return bool(kinds - _LEAVE_SERVER)
        case "CANCELLED", "":  # the server ended the stream while it stopped
            return bool(kinds - _LEAVE_SERVER)
        case "DEADLINE_EXCEEDED", ("" | "DEADLINE_EXCEEDED"):
            return call.asked.deadline_s is not None or bool(kinds)
        case _:
            return False


def _is_out_of_room(index: Index, call: Call) -> bool:
    return any(fault.kind in FULLS for fault in index.disturbances(call, STORE_RECOVERY_S))


def _is_told_end(_: Index, call: Call) -> bool:
    """Whether `Generate` ended with what its job ended with."""
    last = call.events[-1] if call.events else None
    return (
        call.method == "Generate"
        and last is not None
        and last.kind == "failed"
        and (last.reason == call.outcome.reason)
    )


def _is_deleted_meanwhile(index: Index, call: Call) -> bool:
    """Whether `Generate` met a job under its request id, and that job was deleted before its events were read."""
    if call.method != "Generate" or call.outcome.reason != "JOB_NOT_FOUND":
        return False
    return any(
        delete.begun_s < call.ended_s and call.begun_s < delete.ended_s
        for record in index.under(call.owner, call.asked.request_id)
        for delete in record.deletes
    )


def _is_damaged(index: Index, call: Call) -> bool:
    if call.outcome.status != "DATA_LOSS":
        return False
    faults = [fault for fault in index.history.faults if fault.damaged and fault.begun_s < call.ended_s]
    if call.outcome.reason == "LORA_DAMAGED":
        asked = index.adapter(call) if call.method in MAKING else call.asked.adapter
        return any(fault.damaged == asked for fault in faults)
    record = index.jobs.get(call.job_id or call.asked.job_id)
    if call.outcome.reason != "IMAGE_DAMAGED" or record is None:
        return False
    deletes = (delete for delete in record.deletes if delete.begun_s < call.ended_s)
    if any(_is_out_of_room(index, delete) for delete in deletes):
        return True  # where there is no room to write, a job's images are deleted before it is
    images = {sha256 for _, view in record.seen for sha256 in view.images}
    return any(fault.damaged in images and not _is_healed(index, fault, call) for fault in faults)


_CAUSES = (_is_disturbed, _is_told_end, _is_deleted_meanwhile, _is_damaged)


def _is_healed(index: Index, fault: Fault, call: Call) -> bool:
    """Whether a job that was made after the damage had drawn the same image, before the call."""
    for record in index.jobs.values():
        if any(made.existed is False and fault.ended_s < made.begun_s for made in _makers(record)) and any(
            view.state == SUCCEEDED and fault.damaged in view.images and told.ended_s < call.begun_s
            for told, view in record.seen
        ):
            return True
    return False


def _makers(record: JobRecord) -> Iterator[Call]:
    return (call for call in record.shown if call.method in MAKING and call.job_id == record.job_id)


def readiness_returns(index: Index) -> Iterator[Problem]:
    """After each fault the server is ready again; asked to end, it ends, and well."""
    for fault in index.history.faults:
        if not fault.is_ready:
            yield Problem("readiness", f"the server was not ready again after {fault.described()}")
        if fault.hung:
            yield Problem("exit", f"the server did not end: {fault.described()}")
        if fault.exit_code:
            yield Problem("exit", f"the server ended with {fault.exit_code}: {fault.described()}")


ANSWER_RULES = (
    images_are_their_hash,
    equal_plans_equal_pixels,
    one_plan_a_job,
    lists_are_in_order,
    streams_are_whole,
    errors_have_a_cause,
    readiness_returns,
)
