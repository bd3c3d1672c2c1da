"""Time in which this process ran: what is left of the clock without the pauses.

A process is paused by SIGSTOP, with its virtual machine, or where it gets no CPU for seconds; then timers that
came due meanwhile fire all at once, before anybody had a chance. That the event loop looks later than it should is
how a pause shows. (While a laptop is suspended, Linux's monotonic clock stands still, and nothing is to be done.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
TOLERANCE_S = 1.0
"""A look that is late by no more than that is late because the event loop was busy."""
CLOCK_RESOLUTION_S = 0.001
"""Timers may fire early by as much."""
MAX_PAUSES = 256
"""That are remembered; the oldest go first."""


class RunningTime:
    """Notices pauses. Lives on the event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic seconds, the event loop's."""
        self._clock = clock
        self._looked_at = clock()
        self._pauses: deque[tuple[float, float]] = deque(maxlen=MAX_PAUSES)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Looks every second from now on, until `close`."""
        self._looked_at = self._clock()  # nobody looked before, however long that was
        self._look_again()

    def _look_again(self) -> None:
        self.look()
        # A timer of its own rather than a task: it comes before every timer that comes due later in a pause.
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look_again)

    def close(self) -> None:
        """Looks no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        """Notes a pause, if there was one since the last look. Whoever judges a time looks first."""
        now = self._clock()
        if now - self._looked_at > LOOK_EVERY_S + TOLERANCE_S:
            # It began somewhere in the second after the last look; in doubt for whoever was kept waiting.
            self._pauses.append((self._looked_at, now))
            log.warning("process.paused", extra={"seconds": round(now - self._looked_at, 1)})
        self._looked_at = now

    def now(self) -> float:
        """A moment of the clock, for `since`; may be asked for on any thread."""
        return self._clock()

    def since(self, then: float) -> float:
        """Seconds since `then` in which the process ran."""
        paused_s = sum(max(0.0, end - max(begin, then)) for begin, end in self._pauses)
        return self._clock() - then - paused_s

    def call_later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> RunningTimer:
        """Calls `callback` once the process has run for `delay_s` seconds more, unless that is cancelled."""
        return RunningTimer(self, self._clock(), delay_s, callback, *arguments)


class RunningTimer:
    """A call that is to come."""

    def __init__(
        self,
        running_time: RunningTime,
        begun_at: float,
        delay_s: float,
        callback: Callable[..., object],
        *arguments: Any,
    ) -> None:
        """See `RunningTime.call_later`."""
        self._running_time = running_time
        self._begun_at = begun_at
        self._delay_s = delay_s
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._due, callback, arguments)

    def cancel(self) -> None:
        """Nothing is called any more, and nothing is held for it."""
        self._handle.cancel()

    def _due(self, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._running_time.look()
        left_s = self._delay_s - self._running_time.since(self._begun_at)
        if left_s > CLOCK_RESOLUTION_S:
            self._handle = asyncio.get_running_loop().call_later(left_s, self._due, callback, arguments)
        else:
            callback(*arguments)


Timer = asyncio.TimerHandle | RunningTimer
"""What can be cancelled before it is called."""
