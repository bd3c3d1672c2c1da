"""Telling the server that its user left a generation.

A job with a request id waits for its caller to come back: the server cannot tell a call that was cancelled from a
connection that was cut. So who cancels says so, or the device would work on for nobody.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from chromarpc.v1 import generation_service_pb2, job_service_pb2

LEAVE_WAIT_S: Final = 2.0
"""How long leaving takes at most; a server that cannot be told ends the job by itself, only later."""


def must_be_told(request: generation_service_pb2.GenerateRequest) -> bool:
    """Whether the job would wait for its caller, rather than end with the call or go on for good."""
    policy = request.on_disconnect
    return request.HasField("request_id") and policy == generation_service_pb2.DISCONNECT_POLICY_UNSPECIFIED


def leave_request(request_id: str, job_id: str | None) -> job_service_pb2.CancelJobRequest:
    """What it is told. Others who hold on to the same job keep it."""
    if job_id is not None:
        return job_service_pb2.CancelJobRequest(job_id=job_id, when_unattended=True)
    return job_service_pb2.CancelJobRequest(request_id=request_id, when_unattended=True)


class Leaving:
    """Calls of the blocking client that tell it, each in a thread of its own."""

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
