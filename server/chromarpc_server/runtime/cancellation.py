"""The one signal that goes to the device thread: stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chromarpc_server.domain.errors import ChromaError, JobDeadlineExceeded


class Cancellation:
    """Set from any thread, read by the device thread between steps. The first cause wins."""

    def __init__(self, deadline_at: float | None = None) -> None:
        """`deadline_at`: `time.monotonic()` at which the caller stops waiting; None if it never does."""
        self._deadline_at = deadline_at
        self._cause: ChromaError | None = None
        self._asked = threading.Event()
        self.requested_at: float | None = None
        self._listener: Callable[[], None] | None = None

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls `listener` on whichever thread cancels, within the context: for who cannot look between steps."""
        self._listener = listener
        try:
            if self._cause is not None:
                listener()
            yield
        finally:
            self._listener = None

    @property
    def cause(self) -> ChromaError | None:
        """Why it is to stop, where it is."""
        return self._cause

    @property
    def deadline_at(self) -> float | None:
        """When its caller stops waiting, as `time.monotonic()` says it."""
        return self._deadline_at

    def cancel(self, cause: ChromaError) -> None:
        """Asks the job to stop because of `cause`."""
        if self._cause is None:
            self.requested_at = time.monotonic()
            self._cause = cause
            self._asked.set()
            listener = self._listener
            if listener is not None:
                listener()

    def pause(self, seconds: float) -> None:
        """Waits so long, none if negative, or until the job is to stop; then `check`."""
        if self._deadline_at is not None:
            seconds = min(seconds, self._deadline_at - time.monotonic())
        if seconds > 0:
            self._asked.wait(seconds)
        self.check()

    def wait_longer(self, deadline_at: float | None) -> None:
        """Somebody else waits for the job too, until `deadline_at`, or without a deadline."""
        if self._deadline_at is not None:
            self._deadline_at = None if deadline_at is None else max(self._deadline_at, deadline_at)

    def check(self) -> None:
        """Raises the cause once the job is to stop, or JobDeadlineExceeded once the deadline has passed."""
        if self._cause is None and self._deadline_at is not None and time.monotonic() >= self._deadline_at:
            self.cancel(JobDeadlineExceeded("the deadline passed before the job was done"))
        if self._cause is not None:
            raise self._cause
