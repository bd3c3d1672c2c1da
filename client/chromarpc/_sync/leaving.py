"""Telling the server that its user left a generation, from threads."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from chromarpc.leaving import LEAVE_WAIT_S
from chromarpc.v1 import job_service_pb2


class Leaving:
    """Calls that tell it, each in a thread of its own."""

    def __init__(self, tell: Callable[[job_service_pb2.CancelJobRequest], object]) -> None:
        """`tell`: the call."""
        self._tell = tell
        self._open: set[threading.Event] = set()

    def begin(self, request: job_service_pb2.CancelJobRequest) -> threading.Event:
        """Begins to tell it. Takes no lock, so that a finalizer may call it wherever it happens to run.

        Returns what is set once the server has answered, or cannot.
        """
        told = threading.Event()
        self._open.add(told)

        def run() -> None:
            try:
                with suppress(Exception):
                    self._tell(request)
            finally:
                self._open.discard(told)
                told.set()

        try:
            _thread.start_new_thread(run, ())
        except RuntimeError:  # the interpreter ends
            self._open.discard(told)
            told.set()
        return told

    def wait(self) -> None:
        """Returns once everything is told, or after `LEAVE_WAIT_S`."""
        until = time.monotonic() + LEAVE_WAIT_S
        for told in list(self._open):
            told.wait(max(0.0, until - time.monotonic()))


def wait_until_told(told: threading.Event) -> None:
    """Returns once the server knows, or after `LEAVE_WAIT_S`."""
    told.wait(LEAVE_WAIT_S)
