"""Peers that send tokens which nobody has: they are answered less and less often.

Tokens are too long to be guessed, so this does not guard them. It is for clients that try again for ever with a
token that was taken away: they are told when to come back, and look the same as a guesser. A call with a known
token always passes, for a proxy or a gateway is one address for all who use it. One without
any is told to send one, and does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from chromarpc_server.domain.errors import QuotaExceeded

QUOTA = "bad_tokens"
FREE_FAILURES = 10
"""So many calls of a peer are answered as usual."""
MAX_WAIT_S = 60.0
MAX_FAILURES = FREE_FAILURES + math.ceil(math.log2(MAX_WAIT_S))
"""No more are counted: the longest wait is reached, and what is counted has to be forgiven again."""
FORGIVEN_EVERY_S = 60.0
"""A failure is forgotten for each such time without another."""
MAX_PEERS = 16_384
"""That are remembered; the one that was quiet for the longest is forgotten first."""


@dataclass(frozen=True)
class _Failures:
    count: int
    last_at: float
    again_at: float


class BadTokens:
    """Counts failures by peer. Lives on the event loop."""

    def __init__(self, *, max_peers: int = MAX_PEERS, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_peers`: more are not remembered; `clock`: seconds."""
        self._max_peers = max_peers
        self._clock = clock
        self._failures: dict[str, _Failures] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def failed(self, peer: str) -> None:
        """A call of this peer's had no token that is known.

        Raises:
            QuotaExceeded: it came too soon after others; it is not counted.
        """
        now = self._clock()
        found = self._failures.pop(peer, None)
        if found is not None and now < found.again_at:
            self._failures[peer] = found
            raise QuotaExceeded.of(
                "peer",
                QUOTA,
                FREE_FAILURES,
                "too many calls from your address had no token that this server knows",
                retry_after_s=math.ceil((found.again_at - now) * 1000) / 1000,
            )
        forgiven = 0 if found is None else int((now - found.last_at) / FORGIVEN_EVERY_S)
        before = 0 if found is None else max(0, found.count - forgiven)
        count = min(before + 1, MAX_FAILURES)
        wait_s = 0.0 if count < FREE_FAILURES else min(MAX_WAIT_S, 2.0 ** (count - FREE_FAILURES))
        while len(self._failures) >= self._max_peers:
            del self._failures[next(iter(self._failures))]
        self._failures[peer] = _Failures(count, now, now + wait_s)
