"""The server's wall clock, where Debian's libfaketime is installed; its monotonic clock is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
FORWARD_S, BACK_S = 25 * 3600, -49 * 3600
"""More than the day that jobs are kept; more than two."""


class WallClock:
    """What servers take for the time of day."""

    def __init__(self, file: Path) -> None:
        """`file`: where the library reads it."""
        self._file = file
        self._ahead_s = 0
        self.step(0)

    def step(self, seconds: int) -> None:
        """Sets the clock, also that of a server that runs."""
        self._ahead_s += seconds
        # Read at any moment, so it has to be whole at every moment.
        written = self._file.with_suffix(".new")
        written.write_text(f"{self._ahead_s:+d}\n")
        written.replace(self._file)

    def environment(self) -> Mapping[str, str]:
        """What a process has to be started with."""
        return {
            "LD_PRELOAD": str(LIBRARIES[-1]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",  # files keep the times that they got, as after a real step
        }
