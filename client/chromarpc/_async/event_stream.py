"""The events of one generation or job, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import grpc

from chromarpc._async.calls import status_error
from chromarpc._async.concurrency import read, sleep
from chromarpc._async.leaving import running_loop, wait_until_told
from chromarpc.errors import ServerUnavailable, StatusError
from chromarpc.events import Event
from chromarpc.jobs import MOST_TRIES, wait_s
from chromarpc.stream import StreamReader


class AsyncEventStream(AsyncIterator[Event]):
    """The events of one generation, in order; the call is already on its way.

    Leaving it before the end (`async with`, `aclose()`, cancelling the task that waits, or dropping the last
    reference) cancels the call, and the server stops within one step. A job that was made with `detach` goes on.
    """

    def __init__(
        self,
        call: Any,
        target: str,
        resume: Callable[[str, int], Any] | None = None,
        leave: Callable[[str | None], asyncio.Future[None]] | None = None,
    ) -> None:
        """Reads a call.

        Args:
            call: the call.
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
        self._told: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop() if leave is not None else None  # async only
        self._tries = 0
        self._reader = StreamReader()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Waits for the next event.

        Raises:
            StopAsyncIteration: after `Completed`.
            StatusError: the call ended with an error; see `chromarpc.errors`.
            ProtocolError: the stream broke its contract; the call was cancelled.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            while True:
                event = await self._next_event()
                if event is not None:
                    return event
        except (StatusError, StopAsyncIteration):
            self._over = True  # and not left: where the connection was lost, the call may be made again
            self._call.cancel()
            raise
        except BaseException:
            self.close()
            raise

    async def _next_event(self) -> Event | None:
        try:
            response = await read(self._call)
        except grpc.RpcError as failure:
            error = self._reader.ending or status_error(failure, self._target)
            if not await self._come_back(error):
                raise error from None
            return None
        if response is None:
            self._reader.finish()
            raise StopAsyncIteration
        self._tries = 0
        return self._reader.read(response)

    async def _come_back(self, error: StatusError) -> bool:
        """Takes a lost connection up again after the last event that came. Whether it makes sense."""
        job_id = self._reader.job_id
        lost = isinstance(error, ServerUnavailable) and self._reader.ending is None
        if self._resume is None or job_id is None or not lost or self._tries >= MOST_TRIES or self._over:
            return False
        await sleep(wait_s(self._tries))
        self._tries += 1
        self._call = self._resume(job_id, self._reader.sequence)
        return True

    def cancel(self) -> None:
        """Cancels the call; whoever waits for an event gets `Cancelled`."""
        is_over, leave = self._over, self._leave
        self._leave = None  # once is enough
        self._call.cancel()
        if leave is not None and not is_over:
            self._told = leave(self._reader.job_id)

    def close(self) -> None:  # async only
        """Ends the iteration, cancelling the call if it still runs."""
        self.cancel()
        self._over = True

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`; returns once the server knows, where it has to be told."""
        self.cancel()
        self._over = True
        if self._told is not None:
            await wait_until_told(self._told)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The call is part of a reference cycle, so that without this it would run on until a collection.
        if self._call.done():  # async only
            return
        if self._leave is not None and self._loop is not running_loop():  # async only
            self._leave = None  # nobody could make the call
        if not self._over:
            self.cancel()
