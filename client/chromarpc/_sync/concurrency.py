"""What threads do otherwise than an event loop: waiting, reading a call, and when the channel is made.

`chromarpc._async.concurrency` has the same names for asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import grpc

from chromarpc.channel import Connection
from chromarpc.jobs import JobMessage

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

sleep = time.sleep


def in_thread(
    function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Calls what blocks: in the caller's own thread, which waits anyway."""
    return function(*args, **kwargs)


class Channel:
    """A channel that is made at once, so that threads need no lock."""

    def __init__(self, connection: Connection) -> None:
        if connection.credentials is None:
            self._channel = grpc.insecure_channel(connection.target, connection.options)
        else:
            self._channel = grpc.secure_channel(connection.target, connection.credentials, connection.options)

    def get(self) -> grpc.Channel:
        """The channel."""
        return self._channel

    def close(self) -> None:
        """Closes it; calls that still run are cancelled."""
        self._channel.close()


def read(call: Iterator[JobMessage]) -> JobMessage | None:
    """The next message of a call; None after the last.

    Raises:
        RpcError: the call ended with an error.
    """
    return next(call, None)
