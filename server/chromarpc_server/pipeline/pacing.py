"""When the device gets its steps: each shortly before the one before it is done, so that it never waits.

A GPU computes a step while the host does something else. Waiting for each step before the next one is given leaves
the GPU idle for as long as the host needs to report the step, to draw a preview and to give the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from chromarpc_server.pipeline.sampling import DenoiseStep

LEAD_S = 0.005
"""How long before a step's expected end the next one is given. A recorded step is given in 1 ms; one that takes
longer than this to give is not given ahead, for it would be reported that much later and its share of idleness is
small."""

Pause = Callable[[float], None]
"""Waits so many seconds, none if negative; raises to stop the run."""


def finished_steps(steps: Iterator[DenoiseStep], device: torch.device, pause: Pause) -> Iterator[DenoiseStep]:
    """Each step once it is computed.

    A step is given to the device only after `pause` has returned, which is at most `LEAD_S` before the one before
    it is expected to end. Stopping the run in `pause` frees the device within one step; what is being
    computed then is waited for.

    Args:
        steps: computes a step, or gives it to the device, each time it is asked for one.
        device: what computes.
        pause: called once before every step but the first.
    """
    if device.type != "cuda":
        for index, step in enumerate(steps):
            yield step
            if index + 1 < step.total:
                pause(0.0)
        return
    given = _Given.next_of(steps, device)
    expected_s: float | None = None
    ended_at = time.monotonic()
    try:
        while given is not None:
            done = given
            is_last = done.step.index + 1 == done.step.total
            if is_last or expected_s is None or done.giving_s > LEAD_S:
                done.wait()
                yield done.step
                if is_last:
                    return
                pause(0.0)
                given = _Given.next_of(steps, device)
            else:
                pause(ended_at + expected_s - LEAD_S - time.monotonic())
                given = _Given.next_of(steps, device)
                done.wait()
                ended_at = time.monotonic()
                yield done.step
            # Of steps that took long to give, the device spent an unknown part waiting for more.
            expected_s = done.seconds() if done.giving_s <= LEAD_S else None
    finally:
        if given is not None:
            given.wait()


class _Given:
    """A step that the device has been given, between two marks in its stream."""

    def __init__(self, step: DenoiseStep, begin: torch.cuda.Event, end: torch.cuda.Event, giving_s: float) -> None:
        self.step = step
        self.giving_s = giving_s
        """How long the host took to give it."""
        self._begin = begin
        self._end = end

    @classmethod
    def next_of(cls, steps: Iterator[DenoiseStep], device: torch.device) -> _Given | None:
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        begun_at = time.monotonic()
        begin.record(torch.cuda.current_stream(device))
        step = next(steps, None)
        if step is None:
            return None
        end.record(torch.cuda.current_stream(device))
        return cls(step, begin, end, time.monotonic() - begun_at)

    def wait(self) -> None:
        self._end.synchronize()

    def seconds(self) -> float:
        """That the device took; the step is done."""
        elapsed_ms: float = self._begin.elapsed_time(self._end)
        return elapsed_ms / 1000


def beside(device: torch.device) -> torch.cuda.StreamContext:
    """Work in it runs while the next step is computed; what it reads must be finished."""
    return torch.cuda.stream(_stream_beside(device))


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
