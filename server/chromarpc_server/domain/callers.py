"""Who makes a call: a value that the transport sets once for each call, and that everything below may read."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from chromarpc_server.domain.limits import CallerLimits


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call, as the server knows it."""

    name: str
    """Owns the jobs and uploads that it makes; empty where the server does not distinguish callers."""
    limits: CallerLimits = CallerLimits()


NOBODY = Caller("")
"""The one caller of a server that does not ask who calls."""

_CURRENT: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def current_caller() -> Caller:
    """Who makes the call that this task serves."""
    return _CURRENT.get()


def set_current_caller(caller: Caller) -> None:
    """Says who makes the call that this task serves; a call has a task of its own, so nothing is to be undone."""
    _CURRENT.set(caller)
