"""The store's own time, by which it forgets: it goes on as time passes, whatever becomes of the wall clock.

A wall clock is set: by NTP after a start, by people, by a host that resumes a machine. What was kept for a day
must not be forgotten in that moment. So time goes on by the monotonic clock. Where the wall clock is ahead, which
may be a step or the time that the process did not run, the store's time follows at a bounded rate; it never goes
back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

CATCH_UP: Final = 10.0
"""Seconds that the store's time gains on the wall clock in each second: it takes 2.5 hours to follow a step of 25,
in which an operator can see it."""
MAX_GAIN_S: Final = 300.0
"""Gained by one `advance` at most, however long ago the last one was."""
STEP_S: Final = 5.0
"""The wall clock has jumped where it gained or lost more against the monotonic clock since the last look."""


class KeptTime:
    """Seconds since the epoch as the store counts them. Belongs to one thread; others may read its figures."""

    def __init__(
        self,
        kept_s: float | None = None,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on from where an earlier process was.

        Args:
            kept_s: the latest time that the store knows of; None for one that is new, which takes the wall's.
            wall: seconds since the epoch.
            monotonic: seconds since whenever.
        """
        self._wall = wall
        self._monotonic = monotonic
        self._at_s = wall() if kept_s is None else kept_s
        self._looked_s = monotonic()
        self._offset_s = wall() - self._looked_s
        self.steps = 0
        """How often the wall clock was seen to jump."""
        self.ahead_s = wall() - self._at_s
        """How far the wall clock was ahead at the last look; negative where it was behind."""

    def now_s(self) -> float:
        """The store's time."""
        return self._at_s + (self._monotonic() - self._looked_s)

    def now_us(self) -> int:
        """The same in microseconds."""
        return round(self.now_s() * 1e6)

    def advance(self) -> None:
        """Looks at the wall clock, and gains on it where it is ahead; called with every sweep."""
        monotonic, wall = self._monotonic(), self._wall()
        passed_s = monotonic - self._looked_s
        stepped_s = wall - monotonic - self._offset_s
        if abs(stepped_s) > STEP_S:
            self.steps += 1
            log.warning("clock.stepped", extra={"seconds": round(stepped_s, 1)})
        self._offset_s = wall - monotonic
        self._at_s += passed_s
        self._looked_s = monotonic
        gain_s = min(wall - self._at_s, CATCH_UP * passed_s, MAX_GAIN_S)
        self._at_s += max(0.0, gain_s)
        self.ahead_s = wall - self._at_s
