# Generated from client/chromarpc/_async/event_stream.py by tools/unasync.py: do not edit.
"""The events of one generation or job, as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from chromarpc._sync.calls import status_error
from chromarpc._sync.concurrency import read, sleep
from chromarpc._sync.leaving import wait_until_told
from chromarpc.errors import ServerUnavailable, StatusError
from chromarpc.events import Event
from chromarpc.jobs import MOST_TRIES, wait_s
from chromarpc.stream import StreamReader


class EventStream(Iterator[Event]):
    """The events of one generation, in order; the call is already on its way.

    Leaving it before the end (`with`, `close()`, or dropping the last reference) cancels the call, and the
    server stops within one step. A job that was made with `detach` goes on.
    """

    def __init__(
        self,
        call: Any,
        target: str,
        resume: Callable[[str, int], Any] | None = None,
        leave: Callable[[str | None], threading.Event] | None = None,
    ) -> None:
        """Reads a call.

        Args:
            call: at once an iterator and a grpc.Call, which the stubs cannot say.
            target: named where it cannot be reached.
            resume: watches a job from the event after a sequence, where the job outlives a lost connection.
            leave: tells the server that a job is not wanted any more, where cancelling the call does not; is
                given the job's id once that is known.
        """
        self._over = False
        self._call = call
        self._target = target
        self._resume = resume
        self._leave = leave
        self._told: threading.Event | None = None
        self._tries = 0
        self._reader = StreamReader()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Waits for the next event.

        Raises:
            StopIteration: after `Completed`.
            StatusError: the call ended with an error; see `chromarpc.errors`.
            ProtocolError: the stream broke its contract; the call was cancelled.
        """
        if self._over:
            raise StopIteration
        try:
            while True:
                event = self._next_event()
                if event is not None:
                    return event
        except (StatusError, StopIteration):
            self._over = True  # and not left: where the connection was lost, the call may be made again
            self._call.cancel()
            raise
        except BaseException:
            self.close()
            raise

    def _next_event(self) -> Event | None:
        try:
            response = read(self._call)
        except grpc.RpcError as failure:
            error = self._reader.ending or status_error(failure, self._target)
            if not self._come_back(error):
                raise error from None
            return None
        if response is None:
            self._reader.finish()
            raise StopIteration
        self._tries = 0
        return self._reader.read(response)

    def _come_back(self, error: StatusError) -> bool:
        """Takes a lost connection up again after the last event that came. Whether it makes sense."""
        job_id = self._reader.job_id
        lost = isinstance(error, ServerUnavailable) and self._reader.ending is None
        if self._resume is None or job_id is None or not lost or self._tries >= MOST_TRIES or self._over:
            return False
        sleep(wait_s(self._tries))
        self._tries += 1
        self._call = self._resume(job_id, self._reader.sequence)
        return True

    def cancel(self) -> None:
        """Cancels the call, from any thread; whoever waits for an event gets `Cancelled`."""
        is_over, leave = self._over, self._leave
        self._leave = None  # once is enough
        self._call.cancel()
        if leave is not None and not is_over:
            self._told = leave(self._reader.job_id)

    def close(self) -> None:
        """Ends the iteration, cancelling the call if it still runs."""
        self.cancel()
        self._over = True
        if self._told is not None:
            wait_until_told(self._told)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The call is part of a reference cycle, so that without this it would run on until a collection.
        if not self._over:
            self.cancel()
