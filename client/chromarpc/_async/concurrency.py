"""What an event loop does otherwise than threads: waiting, reading a call, and when the channel is made.

`chromarpc._sync.concurrency` has the same names for threads.
"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

from chromarpc.channel import Connection
from chromarpc.errors import Cancelled
from chromarpc.jobs import JobMessage

sleep = asyncio.sleep
in_thread = asyncio.to_thread
"""Calls what blocks without holding up the loop."""


class AsyncChannel:
    """A channel that is made on first use, because it belongs to the event loop that runs then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: grpc.aio.Channel | None = None

    def get(self) -> grpc.aio.Channel:
        """The channel."""
        if self._channel is None:
            to = self._connection
            if to.credentials is None:
                self._channel = grpc.aio.insecure_channel(to.target, to.options)
            else:
                self._channel = grpc.aio.secure_channel(to.target, to.credentials, to.options)
        return self._channel

    async def close(self) -> None:
        """Closes it; calls that still run are cancelled."""
        if self._channel is not None:
            await self._channel.close()


async def read(call: grpc.aio.UnaryStreamCall[object, JobMessage]) -> JobMessage | None:
    """The next message of a call; None after the last.

    Raises:
        RpcError: the call ended with an error.
        Cancelled: this side cancelled the call.
    """
    try:
        response = await call.read()
    except asyncio.CancelledError:
        # grpc answers a read after `cancel()` as if the task itself were cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Cancelled("cancelled by this side", code=grpc.StatusCode.CANCELLED) from None
    return response if isinstance(response, JobMessage) else None  # grpc.aio.EOF
