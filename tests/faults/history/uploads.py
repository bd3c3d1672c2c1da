"""Rules of uploaded adapters: kept until they are deleted, and of use to those who uploaded them alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.history.index import Index
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import MAKING, Call

_GONE = frozenset({"LORA_NOT_FOUND", "LORA_CHANGED"})
"""The second is what `RedrawJob` says of an adapter that its job had."""


@dataclass
class _Share:
    """What one owner did with one adapter."""

    uploads: list[Call] = field(default_factory=list)
    deletes: list[Call] = field(default_factory=list)
    """Those that may have acted."""

    def may_be_there(self, call: Call) -> bool:
        """Whether an upload had begun by the call's end."""
        return any(upload.begun_s < call.ended_s for upload in self.uploads)

    def has_to_be_there(self, call: Call) -> bool:
        """Whether it was uploaded before the call, and no deletion can have come of it since."""
        uploaded = any(upload.outcome.is_ok and upload.ended_s < call.begun_s for upload in self.uploads)
        return uploaded and not any(delete.begun_s < call.ended_s for delete in self.deletes)

    def deletion_before(self, call: Call) -> Call | None:
        """An acknowledged one, where it cannot have been uploaded again between that and the call."""
        for delete in self.deletes:
            if delete.outcome.is_ok and delete.ended_s < call.begun_s:
                later = (up for up in self.uploads if delete.begun_s < up.ended_s and up.begun_s < call.ended_s)
                if next(later, None) is None:
                    return delete
        return None


def _shares(index: Index) -> dict[tuple[str, str], _Share]:
    shares: dict[tuple[str, str], _Share] = defaultdict(_Share)
    for call in index.history.calls:
        share = shares[call.owner, call.asked.adapter]
        if call.method == "UploadLora":
            share.uploads.append(call)
        elif call.method == "DeleteLora" and call.outcome.may_have_acted:
            share.deletes.append(call)
    return shares


def _used(index: Index, call: Call) -> Sequence[str]:
    """Adapters that the call showed, or made a job with."""
    adapter = index.adapter(call) if call.method in MAKING and call.job_id else ""
    return (*call.adapters, adapter) if adapter else call.adapters


def adapters_are_their_owners(index: Index) -> Iterator[Problem]:
    """An uploaded adapter is shown to, and can be used by, those who uploaded it."""
    shares = _shares(index)
    for call in index.history.calls:
        for adapter in _used(index, call):
            if not shares[call.owner, adapter].may_be_there(call):
                text = f"{call.owner} gets {adapter[:12]} with {call.method}, and never uploaded it"
                yield Problem("foreign", text, call.job_id, (call.number,))


def adapters_are_kept(index: Index) -> Iterator[Problem]:
    """An uploaded adapter is there for as long as its owner cannot have deleted it, and then not any more."""
    shares = _shares(index)
    for call in index.history.calls:
        missed = set()
        if call.outcome.reason in _GONE and not call.job_id:
            missed.add(index.adapter(call) if call.method in MAKING else call.asked.adapter)
        if call.method == "ListLoras" and call.outcome.is_ok and call.is_last_page:
            missed = {adapter for owner, adapter in shares if owner == call.owner} - set(call.adapters)
        for adapter in sorted(missed - {""}):
            if shares[call.owner, adapter].has_to_be_there(call):
                text = f"the adapter {adapter} was uploaded, nobody deleted it, and it is gone"
                yield Problem("lost", text, "", (call.number,))
        for adapter in call.adapters:
            delete = shares[call.owner, adapter].deletion_before(call)
            if delete is not None:
                text = f"the adapter {adapter} was deleted and came back"
                yield Problem("revived", text, "", (delete.number, call.number))


UPLOAD_RULES = (adapters_are_their_owners, adapters_are_kept)
