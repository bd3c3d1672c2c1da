"""How many calls a minute may be begun, by each caller and from each peer."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from chromarpc_server.domain.callers import NOBODY, current_caller
from chromarpc_server.domain.errors import QuotaExceeded
from chromarpc_server.transport.access.authentication import OPEN_SERVICES
from chromarpc_server.transport.access.interceptor import Call
from chromarpc_server.transport.access.peers import peer_address

QUOTA = "max_calls_per_minute"
MAX_BUCKETS = 16_384
"""Callers or peers that are remembered; the one that was quiet for the longest is forgotten first."""
BURST_PART = 5
"""A burst is this part of a minute's calls: enough for all streams that a caller may have, after a restart."""
MIN_BURST = 10
"""Calls of a burst where a minute has so many."""

_ROUNDING_S = 1e-6
"""What thousands of sums of seconds may be wrong by."""


class TokenBuckets:
    """A token bucket for each key, kept as the one moment at which it is full again.

    What a bucket lacks of being full is worth the time until then, so a key costs one number, and one that is full
    need not be kept at all.
    """

    def __init__(self, *, max_buckets: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_buckets`: more are not kept; `clock`: seconds."""
        self._max_buckets = max_buckets
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_s(self, key: str, per_minute: int) -> float:
        """Seconds until the bucket holds a token: 0 where it does, infinite where it never will."""
        if per_minute <= 0:
            return math.inf
        a_token_s = 60 / per_minute
        lacks_s = self._full_at.get(key, 0.0) - self._clock()
        short_s = lacks_s - (burst(per_minute) - 1) * a_token_s - _ROUNDING_S
        # In whole milliseconds and never too few: whoever waits for so long is let through.
        return math.ceil(max(0.0, short_s) * 1000) / 1000

    def take(self, key: str, per_minute: int) -> None:
        """Takes a token that `wait_s` found."""
        now = self._clock()
        full_at = max(now, self._full_at.pop(key, now)) + 60 / per_minute
        while len(self._full_at) >= self._max_buckets:
            del self._full_at[next(iter(self._full_at))]
        self._full_at[key] = full_at


def burst(per_minute: int) -> int:
    """How many calls may come at once, after a quiet while."""
    return max(1, per_minute // BURST_PART, min(MIN_BURST, per_minute))


class CallRates:
    """Counts calls as they begin. Lives on the event loop.

    Only calls of known callers count: what strangers send is bounded by the back-off for bad tokens, and cannot
    use up what the callers behind the same gateway may send.
    """

    def __init__(self, per_peer: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_peer`: calls a minute from one peer; a caller's own number is among its limits."""
        self._per_peer = per_peer
        self._of_callers = TokenBuckets(clock=clock)
        self._of_peers = TokenBuckets(clock=clock)

    @asynccontextmanager
    async def middleware(self, call: Call) -> AsyncIterator[None]:
        """Lets a call through, or refuses it.

        Raises:
            QuotaExceeded: the caller, or the peer, began as many in the last minute as it may.
        """
        if call.service not in OPEN_SERVICES:
            caller, peer = current_caller(), peer_address(call.peer)
            per_caller = caller.limits.max_calls_per_minute
            # Where nobody is known, all are one caller: one of them must not use up what the others may send.
            is_known = caller.name != NOBODY.name
            if is_known:
                _require(self._of_callers.wait_s(caller.name, per_caller), "caller", per_caller, "you make")
            _require(self._of_peers.wait_s(peer, self._per_peer), "peer", self._per_peer, "your address makes")
            if is_known:
                self._of_callers.take(caller.name, per_caller)
            self._of_peers.take(peer, self._per_peer)
        yield


def _require(wait_s: float, subject: str, per_minute: int, who: str) -> None:
    if wait_s > 0:
        raise QuotaExceeded.of(
            subject,
            QUOTA,
            per_minute,
            f"{who} more calls than {per_minute} a minute",
            retry_after_s=None if math.isinf(wait_s) else wait_s,
        )
