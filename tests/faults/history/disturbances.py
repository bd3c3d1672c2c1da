"""Has planned faults happen to the server, one after the other, and waits each time until it is ready again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.history import flips
from tests.faults.history.choices import PlannedFault
from tests.faults.history.clock import BACK_S, FORWARD_S, WallClock
from tests.faults.history.disk import Disk
from tests.faults.history.recorded import Fault
from tests.faults.history.server_life import ServerLife


@dataclass(frozen=True)
class _Happened:
    """What came of a fault, before the server is ready again."""

    exit_code: int | None = None
    hung: bool = False
    damaged: str = ""
    detail: str = ""
    has_ended: bool = True
    """Whether the process has, so that another one is to be started."""
    was_ready: bool = True
    """Whether a process that was started meanwhile was ready in time."""


class Disturbances:
    """Disturbs one server."""

    def __init__(self, life: ServerLife, disk: Disk, clock: WallClock | None) -> None:
        """`disk`: the one that the server writes to; `clock`: the server's, if it can be set."""
        self._life = life
        self._disk = disk
        self._clock = clock
        self._by_kind: Mapping[str, Callable[[PlannedFault], _Happened]] = {
            "kill": self._kill,
            "kill_in_start": self._kill_in_start,
            "kill_in_drain": self._kill_in_drain,
            "term": self._term,
            "double_term": self._double_term,
            "stop": self._stop,
            "full": self._full,
            "kill_when_full": lambda planned: self._again_when_full(planned, self._kill),
            "term_when_full": lambda planned: self._again_when_full(planned, self._term),
            "flip_image": lambda planned: self._flip(planned, flips.stored_images),
            "flip_upload": lambda planned: self._flip(planned, flips.stored_uploads),
            "clock_forward": lambda _: self._step(FORWARD_S),
            "clock_back": lambda _: self._step(BACK_S),
        }

    def happen(self, planned: PlannedFault) -> Fault:
        """Returns once the server is ready again, or does not get ready."""
        begun_s = time.monotonic()
        happened = self._by_kind[planned.kind](planned)
        if happened.has_ended:
            self._life.start()
        is_ready = happened.was_ready and self._life.await_ready()
        return Fault(
            kind=planned.kind,
            begun_s=begun_s,
            ended_s=time.monotonic(),
            is_ready=is_ready,
            exit_code=happened.exit_code,
            hung=happened.hung,
            damaged=happened.damaged,
            detail=happened.detail,
        )

    def stop_in_good_order(self) -> Fault:
        """SIGTERM and another start, as the end of a run has it."""
        return replace(
            self.happen(PlannedFault("term", after_s=0, moment_s=0, hold_s=0, pick=0)), detail="at the end"
        )

    def _kill(self, planned: PlannedFault) -> _Happened:
        self._life.kill()
        return _Happened()

    def _kill_in_start(self, planned: PlannedFault) -> _Happened:
        self._life.kill()
        self._life.start()
        time.sleep(planned.moment_s)
        self._life.kill()
        return _Happened(detail=f"{planned.moment_s:.1f} s after its begin")

    def _kill_in_drain(self, planned: PlannedFault) -> _Happened:
        self._life.signal(signal.SIGTERM)
        time.sleep(planned.moment_s / 2)
        self._life.kill()
        return _Happened(detail=f"{planned.moment_s / 2:.1f} s after its begin")

    def _term(self, planned: PlannedFault) -> _Happened:
        self._life.signal(signal.SIGTERM)
        code = self._life.await_exit()
        return _Happened(exit_code=code, hung=code is None)

    def _double_term(self, planned: PlannedFault) -> _Happened:
        self._life.signal(signal.SIGTERM)
        time.sleep(planned.moment_s / 2)
        return self._term(planned)

    def _stop(self, planned: PlannedFault) -> _Happened:
        self._life.signal(signal.SIGSTOP)
        time.sleep(planned.hold_s)
        self._life.signal(signal.SIGCONT)
        return _Happened(has_ended=False, detail=f"for {planned.hold_s:.1f} s")

    def _full(self, planned: PlannedFault) -> _Happened:
        with self._disk.full(self._life.process.pid):
            time.sleep(planned.hold_s)
        return _Happened(has_ended=False, detail=f"for {planned.hold_s:.1f} s, by {self._disk.how}")

    def _again_when_full(self, planned: PlannedFault, end: Callable[[PlannedFault], _Happened]) -> _Happened:
        """Ends a process on a full disk and starts another one there, which gets ready before there is room."""
        with self._disk.full(self._life.process.pid):
            time.sleep(planned.moment_s)
            happened = end(planned)
            self._disk.fill_again()  # with what the process gave up
            self._life.start()
            was_ready = self._life.await_ready()
            self._disk.fill_again()
            time.sleep(planned.hold_s)
        return replace(
            happened,
            has_ended=False,
            was_ready=was_ready,
            detail=f"for {planned.hold_s:.1f} s after the start, by {self._disk.how}",
        )

    def _flip(self, planned: PlannedFault, files: Callable[[Path], Sequence[Path]]) -> _Happened:
        damaged = flips.flip(files(self._life.data_dir), planned.pick)
        return _Happened(has_ended=False, damaged=damaged, detail=damaged or "nothing was there to be damaged")

    def _step(self, seconds: int) -> _Happened:
        assert self._clock is not None
        self._clock.step(seconds)
        return _Happened(has_ended=False, detail=f"by {seconds / 3600:+g} h")
