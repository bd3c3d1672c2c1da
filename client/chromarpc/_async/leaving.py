"""Telling the server that its user left a generation, beside what else the event loop does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from chromarpc.leaving import LEAVE_WAIT_S
from chromarpc.v1 import job_service_pb2


class AsyncLeaving:
    """Calls that tell it, each in a task of its own."""

    def __init__(self, tell: Callable[[job_service_pb2.CancelJobRequest], Awaitable[object]]) -> None:
        """`tell`: the call."""
        self._tell = tell
        self._open: set[asyncio.Future[None]] = set()

    def begin(self, request: job_service_pb2.CancelJobRequest) -> asyncio.Future[None]:
        """Begins to tell it.

        Returns what is done once the server has answered, or cannot.
        """

        async def run() -> None:
            with suppress(grpc.RpcError):
                await self._tell(request)

        told = asyncio.ensure_future(run())
        self._open.add(told)
        told.add_done_callback(self._open.discard)
        return told

    async def wait(self) -> None:
        """Returns once everything is told, or after `LEAVE_WAIT_S`."""
        if self._open:
            await asyncio.wait(self._open, timeout=LEAVE_WAIT_S)


async def wait_until_told(told: asyncio.Future[None]) -> None:
    """Returns once the server knows, or after `LEAVE_WAIT_S`."""
    await asyncio.wait([told], timeout=LEAVE_WAIT_S)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
