"""Whether the device thread still gets on: it says what it does, and the event loop looks at the clock.

Time in which the whole process was paused does not count.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from chromarpc_server.domain.errors import DeviceHung
from chromarpc_server.domain.limits import DeviceTimeouts
from chromarpc_server.runtime.running_time import RunningTime

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Doing:
    what: str
    limit_s: float
    begun_at: float


class Watchdog:
    """The device thread writes, the event loop reads; each value is replaced whole."""

    def __init__(self, timeouts: DeviceTimeouts, running_time: RunningTime, *, device_id: str = "") -> None:
        """Begins idle.

        Args:
            timeouts: how long each thing may take.
            running_time: the event loop's.
            device_id: what is watched, for the log.
        """
        self._device_id = device_id
        self._timeouts = timeouts
        self._running_time = running_time
        self._doing: _Doing | None = None

    def step(self, expected_s: float | None = None, *, calls: int = 1) -> None:
        """A denoising step begins, which probably takes `expected_s` and calls the model so often."""
        expected = 0.0 if expected_s is None else self._timeouts.step_factor * expected_s
        self._begin("a denoising step", max(calls * self._timeouts.step_s, expected))

    def other(self, what: str) -> None:
        """Something else begins: reading weights, compiling, decoding."""
        self._begin(what, self._timeouts.other_s)

    def idle(self) -> None:
        """Nothing is done now."""
        self._doing = None

    async def guard(self, work: Awaitable[_T]) -> _T:
        """What `work`, which runs on the device thread, gives.

        Raises:
            DeviceHung: something takes too long; every thread's stack has gone to standard error.
        """
        future = asyncio.ensure_future(work)
        # Whoever waits here may be cancelled: nobody asks then what the work ends with, and asyncio would log it.
        future.add_done_callback(_note_end)
        while True:
            await asyncio.wait({future}, timeout=LOOK_EVERY_S)
            if future.done():
                return future.result()
            self._running_time.look()
            doing = self._doing
            if doing is not None and self._running_time.since(doing.begun_at) > doing.limit_s:
                log.critical("device.hung", extra={"device": self._device_id, "doing": doing.what})
                with suppress(OSError, ValueError):  # standard error may be closed, or no file
                    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                future.cancel()
                raise DeviceHung(f"the device does not answer: {doing.what} takes too long")

    def _begin(self, what: str, limit_s: float) -> None:
        self._doing = _Doing(what, limit_s, self._running_time.now())


def _note_end(future: asyncio.Future[_T]) -> None:
    if not future.cancelled():
        future.exception()
