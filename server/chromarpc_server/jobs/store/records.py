"""Plans and events as JSON, and back. Images' bytes are not in it: a stored chunk says where they lie."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.error_table import BY_REASON
from chromarpc_server.domain.errors import ChromaError, FieldViolation, InternalError, QuotaViolation
from chromarpc_server.domain.events import (
    Accepted,
    Cancelled,
    Completed,
    Event,
    Failed,
    ImageChunk,
    ImageHeader,
    Loading,
    Prepared,
    Preview,
    Queued,
    Restarted,
    Step,
)
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.log import LoggedEvent, StoredChunk, StoredEvent

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)
_HEADERS: TypeAdapter[tuple[ImageHeader, ...]] = TypeAdapter(tuple[ImageHeader, ...])
STORED_NAMES: dict[type[Event], str] = {
    Accepted: "Accepted",
    Restarted: "Restarted",
    Queued: "Queued",
    Loading: "Loading",
    Prepared: "Prepared",
    Step: "Step",
    ImageHeader: "ImageHeader",
    ImageChunk: "StoredChunk",
    Completed: "Completed",
    Failed: "Failed",
    Cancelled: "Cancelled",
}
"""What the database calls each kind of event, whatever its class is called. A name that was released stays."""
_ACCEPTED = STORED_NAMES[Accepted]
_CHUNK = STORED_NAMES[ImageChunk]
_PLAIN: dict[str, TypeAdapter[Any]] = {
    STORED_NAMES[kind]: TypeAdapter(kind)
    for kind in (Queued, Loading, Prepared, Restarted, Step, ImageHeader, Completed)
}
_ENDINGS: dict[str, type[Failed | Cancelled]] = {STORED_NAMES[kind]: kind for kind in (Failed, Cancelled)}


@dataclass(frozen=True)
class KnownAdapter:
    """What is remembered of one of a job's adapters, to know it again."""

    size_bytes: int
    modified_ns: int
    inode: int
    sha256: str | None = None
    """Once the file was read."""

    @classmethod
    def of(cls, file: AdapterFile, sha256: str | None = None) -> KnownAdapter:
        """What the file system says of the file, and its hash where it is known."""
        return cls(file.size_bytes, file.modified_ns, file.inode, sha256 or file.sha256)

    def is_still(self, file: AdapterFile) -> bool:
        """Whether the file has not been written since.

        One that is named by its hash may have been: its bytes are checked when they are read.
        """
        if file.sha256 is not None:
            return self.sha256 in (None, file.sha256)
        return KnownAdapter.of(file, self.sha256) == self


def known_adapters(files: Sequence[AdapterFile], hashes: Sequence[str | None]) -> list[KnownAdapter]:
    """What to remember of a job's adapters, all of which are here."""
    return [KnownAdapter.of(file, sha256) for file, sha256 in zip(files, hashes, strict=True)]


_KNOWN: TypeAdapter[tuple[KnownAdapter | None, ...]] = TypeAdapter(tuple[KnownAdapter | None, ...])


def microseconds(time: datetime) -> int:
    """Since the epoch."""
    return (time - _EPOCH) // _MICROSECOND


def from_microseconds(count: int) -> datetime:
    """The inverse."""
    return _EPOCH + count * _MICROSECOND


def plan_json(plan: Plan, *, with_prompts: bool) -> str:
    """The plan; `with_prompts` False leaves their text out, and the plan cannot be run from what is left."""
    if not with_prompts:
        plan = replace(plan, prompts=tuple(replace(prompt, prompt="", neg="") for prompt in plan.prompts))
    return _dump(plan)


def read_plan(text: str) -> Plan:
    """The inverse."""
    return _PLAN.validate_python(json.loads(text))


def headers_json(headers: Iterable[ImageHeader]) -> str:
    """What images there are."""
    return _dump(tuple(headers))


def read_headers(text: str) -> tuple[ImageHeader, ...]:
    """The inverse."""
    return _HEADERS.validate_python(json.loads(text))


def adapters_json(known: Iterable[KnownAdapter | None]) -> str:
    """What is remembered of adapters; None for one that was not fetched yet."""
    return _dump(tuple(known))


def read_adapters(text: str) -> tuple[KnownAdapter | None, ...]:
    """The inverse."""
    return _KNOWN.validate_python(json.loads(text))


def ending_json(ending: LoggedEvent) -> str:
    """A terminal event."""
    return _dump(_record(ending))


def read_ending(text: str) -> LoggedEvent:
    """The inverse."""
    sequence, time_us, kind, payload = json.loads(text)
    event = _ENDINGS[kind](_read_error(payload)) if kind in _ENDINGS else _PLAIN[kind].validate_python(payload)
    return LoggedEvent(sequence, from_microseconds(time_us), event)


def pack_events(entries: Iterable[LoggedEvent]) -> bytes:
    """Events, compressed; previews are left out."""
    records = [_record(entry) for entry in entries if not isinstance(entry.event, Preview)]
    return zlib.compress(_dump(records).encode(), 6)


def unpack_events(data: bytes, accepted: Accepted) -> tuple[StoredEvent, ...]:
    """The inverse."""
    return tuple(_stored(record, accepted) for record in json.loads(zlib.decompress(data)))


def _dump(value: object) -> str:
    # Python's own JSON escapes what is no UTF-8: a stray surrogate in a file's metadata keeps no job from its end.
    return json.dumps(value, default=_plain, separators=(",", ":"))


def _plain(value: object) -> object:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be stored")


def _record(logged: LoggedEvent) -> list[Any]:
    event = logged.event
    kind = STORED_NAMES[type(event)]
    payload: Any
    match event:
        case Accepted():
            payload = None
        case Failed(error=error) | Cancelled(error=error):
            payload = _error_record(error)
        case ImageChunk():
            payload = [event.prompt_index, event.offset_bytes, len(event.data)]
        case _:
            payload = event
    return [logged.sequence, microseconds(logged.time), kind, payload]


def _stored(record: list[Any], accepted: Accepted) -> StoredEvent:
    sequence, time_us, kind, payload = record
    event: Any
    if kind == _ACCEPTED:
        event = accepted
    elif kind == _CHUNK:
        event = StoredChunk(*payload)
    elif kind in _ENDINGS:
        event = _ENDINGS[kind](_read_error(payload))
    else:
        event = _PLAIN[kind].validate_python(payload)
    return StoredEvent(sequence, from_microseconds(time_us), event)


def _error_record(error: ChromaError) -> dict[str, Any]:
    quota = error.quota
    return {
        "reason": error.reason,
        "message": error.message,
        "violations": [[violation.field, violation.description] for violation in error.violations],
        "metadata": error.metadata,
        "retry_after_s": error.retry_after_s,
        "quota": None if quota is None else [quota.subject, quota.quota, quota.limit, quota.description],
    }


def _read_error(record: Mapping[str, Any]) -> ChromaError:
    quota = record["quota"]
    entry = BY_REASON.get(record["reason"])
    kind = InternalError if entry is None else entry.kind
    return kind(
        record["message"],
        violations=[FieldViolation(*violation) for violation in record["violations"]],
        metadata=record["metadata"],
        retry_after_s=record["retry_after_s"],
        quota=None if quota is None else QuotaViolation(*quota),
    )
