"""How many calls may be in progress at once, of each caller and of all together."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import QuotaExceeded
from chromarpc_server.transport.access.authentication import OPEN_SERVICES
from chromarpc_server.transport.access.interceptor import Call

QUOTA = "max_streams"
RETRY_AFTER_S = 1.0
MAX_OPEN_CALLS = 256
"""Of health, which anyone may call: they must not use up what callers share."""


class CallQuotas:
    """Counts calls in progress. Lives on the event loop."""

    def __init__(self, max_calls: int) -> None:
        """`max_calls`: of all callers together."""
        self._max_calls = max_calls
        self._by_caller: Counter[str] = Counter()
        self._open = 0

    @property
    def in_progress(self) -> int:
        """Calls in progress now, but those of health."""
        return self._by_caller.total()

    @asynccontextmanager
    async def middleware(self, call: Call) -> AsyncIterator[None]:
        """Counts the call while it lasts.

        Raises:
            QuotaExceeded: there are as many as there may be.
        """
        if call.service in OPEN_SERVICES:
            async with self._of_health():
                yield
            return
        caller = current_caller()
        limit = caller.limits.max_streams
        if self._by_caller[caller.name] >= limit:
            raise _too_many("caller", limit, f"you have {limit} calls in progress, as many as you may")
        if self.in_progress >= self._max_calls:
            raise _too_many("server", self._max_calls, "the server has as many calls in progress as it takes")
        self._by_caller[caller.name] += 1
        try:
            yield
        finally:
            self._by_caller[caller.name] -= 1
            if not self._by_caller[caller.name]:
                del self._by_caller[caller.name]

    @asynccontextmanager
    async def _of_health(self) -> AsyncIterator[None]:
        if self._open >= MAX_OPEN_CALLS:
            raise _too_many("server", MAX_OPEN_CALLS, "the server has as many health checks as it takes")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


def _too_many(subject: str, limit: int, description: str) -> QuotaExceeded:
    return QuotaExceeded.of(subject, QUOTA, limit, description, retry_after_s=RETRY_AFTER_S)
