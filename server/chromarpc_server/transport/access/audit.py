"""The audit log: who cancelled, deleted, inspected and read what, and who was refused.

A line for each call that does one of these, when it has ended, with its outcome. Of what callers send it holds ids
and hashes, the host of a URL, and the path of an adapter that was there: nothing that could be a secret.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from typing import Any, Final
from urllib.parse import urlsplit

from chromarpc_server.domain.adapter_urls import is_url
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import ChromaError, QuotaExceeded, Unauthenticated
from chromarpc_server.transport.access import bad_tokens, quotas, rates
from chromarpc_server.transport.access.interceptor import Call
from chromarpc_server.transport.access.outcomes import outcome
from chromarpc_server.transport.access.peers import peer_address
from chromarpc_server.transport.messages.errors import code_of

AUDIT_LOGGER = "chromarpc.audit"
log = logging.getLogger(AUDIT_LOGGER)

REFUSALS_EVERY_S = 10.0
MAX_REFUSAL_LINES = 32
"""In that time; further peers are counted together."""

_Ids = dict[str, str]
_ID: Final = re.compile("[0-9a-fA-F-]{1,64}")
_HOST: Final = re.compile("[a-z0-9.:_-]{1,253}")
_ACCESS_QUOTAS: Final = frozenset({bad_tokens.QUOTA, rates.QUOTA, quotas.QUOTA})


class Audited(Enum):
    """What calls do that somebody may want to look up."""

    CANCEL = auto()
    DELETE = auto()
    INSPECT = auto()
    IMAGE_READ = auto()
    REDRAW = auto()
    REFUSED = auto()


EVENTS: Final[dict[Audited, str]] = {
    Audited.CANCEL: "audit.cancel",
    Audited.DELETE: "audit.delete",
    Audited.INSPECT: "audit.inspect",
    Audited.IMAGE_READ: "audit.image_read",
    Audited.REDRAW: "audit.redraw",
    Audited.REFUSED: "audit.refused",
}


def _job(request: Any) -> _Ids:
    """A job by its id, or by that of its request."""
    if request.job_id:
        return {"job_id": _id(request.job_id)}
    return {"request_id": _id(getattr(request, "request_id", ""))}


def _adapter(request: Any) -> _Ids:
    """An adapter by its hash, by the host of its URL, or by its path, which is kept if the call succeeds."""
    path: str = request.path
    if path.startswith("sha256:"):
        return {"sha256": _id(path.removeprefix("sha256:"))}
    return {"host": _host(path)} if is_url(path) else {"path": path}


def _watched(request: Any) -> _Ids | None:
    """A stream of a job's events hands out its images too, unless it is asked not to."""
    return None if request.omit_image_bytes else _job(request)


def _returned_to(request: Any) -> _Ids | None:
    """A request under an id may find the job that it made before, and be given its images again."""
    return {"request_id": _id(request.request_id)} if request.HasField("request_id") else None


def _of_http(request: Any) -> _Ids:
    """The HTTP API calls a job's id that of its request."""
    return {"job_id": _id(request.request_id)}


METHODS: Final[dict[str, tuple[Audited, Callable[[Any], _Ids | None]]]] = {
    "/chromarpc.v1.JobService/CancelJob": (Audited.CANCEL, _job),
    "/chromarpc.v1.JobService/DeleteJob": (Audited.DELETE, _job),
    "/chromarpc.v1.JobService/GetImage": (Audited.IMAGE_READ, _job),
    "/chromarpc.v1.JobService/WatchJob": (Audited.IMAGE_READ, _watched),
    "/chromarpc.v1.JobService/RedrawJob": (Audited.REDRAW, _job),
    "/chromarpc.v1.GenerationService/Generate": (Audited.IMAGE_READ, _returned_to),
    "/chromarpc.compat.v1.InferenceService/DownloadInferenceImage": (Audited.IMAGE_READ, _of_http),
    "/chromarpc.v1.LoraService/InspectLora": (Audited.INSPECT, _adapter),
    "/chromarpc.v1.LoraService/DeleteLora": (Audited.DELETE, _adapter),
}


class CallAudit:
    """Writes the lines. Lives on the event loop."""

    def __init__(self) -> None:
        """Begins with nothing refused."""
        self._refusals = _Refusals()

    def close(self) -> None:
        """Writes what was counted and not written yet."""
        self._refusals.close()

    @asynccontextmanager
    async def middleware(self, call: Call) -> AsyncIterator[None]:
        """Around authentication, so that whoever is refused is seen too."""
        kind, ids_of = METHODS.get(call.method, (None, None))
        asked: list[_Ids | None] = []
        if ids_of is not None:
            call.on_request = lambda request: asked.append(ids_of(request))
        ended_by: BaseException | None = None
        try:
            yield
        except BaseException as error:
            ended_by = error
            raise
        finally:
            refused = _refusal(ended_by)
            ids = asked[0] if asked else {}
            if refused is not None:
                self._refusals.add(call, refused)
            elif kind is not None and ids is not None:
                ended = outcome(call, ended_by).name
                if ended != "OK":
                    ids.pop("path", None)
                who = {"caller": current_caller().name, "peer": call.peer}
                log.info(EVENTS[kind], extra={**who, **ids, "outcome": ended})
            del ended_by


@dataclass(frozen=True)
class _Refusal:
    """Calls that were refused alike."""

    caller: str
    peer: str
    outcome: str
    quota: str


class _Refusals:
    """Counts calls that were refused: the first is logged at once, those after it together."""

    def __init__(self) -> None:
        self._counts: Counter[_Refusal] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Call, error: ChromaError) -> None:
        """Counts one."""
        quota = "" if error.quota is None else error.quota.quota
        peer = peer_address(call.peer)
        refusal = _Refusal(current_caller().name, peer, code_of(error).name, quota)
        if refusal not in self._counts and len(self._counts) >= MAX_REFUSAL_LINES:
            refusal = replace(refusal, caller="", peer="others")
        self._counts[refusal] += 1
        if self._timer is None:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._write()
            if self._timer is not None:
                self._timer.cancel()

    def _write(self) -> None:
        self._timer = None
        if not self._counts:
            return
        for refusal, count in self._counts.items():
            log.warning(EVENTS[Audited.REFUSED], extra={**asdict(refusal), "refused": count})
        self._counts.clear()
        self._timer = asyncio.get_running_loop().call_later(REFUSALS_EVERY_S, self._write)


def _refusal(error: BaseException | None) -> ChromaError | None:
    """The error of a call that was not let through."""
    if isinstance(error, Unauthenticated):
        return error
    if isinstance(error, QuotaExceeded) and error.quota is not None and error.quota.quota in _ACCESS_QUOTAS:
        return error
    return None


def _id(text: str) -> str:
    """An id or hash; what is none may be anything, and is not repeated."""
    return text if _ID.fullmatch(text) else "malformed"


def _host(url: str) -> str:
    """Where a URL leads; what else it has may be a password or a token."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    return host if _HOST.fullmatch(host) else "malformed"
