"""Connections to addresses that were checked, and answers whose length can be counted exactly.

The rest of the HTTP client is httpcore2's; it reaches the network only by what is here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence

import httpcore2

from chromarpc_server.adapters.public_http.addresses import IPAddress

MAX_ADDRESSES = 4
"""How many addresses of one name are tried; the time limit holds for each."""
CLOSE_GRACE_S = 0.5
"""How long a server that was asked to close may take before its silence counts as the end of the answer."""


class CheckedStream(httpcore2.AsyncNetworkStream):
    """A connection that hands over an answer's head line by line, so that its body can be counted exactly.

    The HTTP parser drops what a server sends beyond the length it announced; here nothing of the body has
    been handed over when the head is complete, and what is left at the end can be seen.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._unread = b""
        self._in_head = True
        self._body_left: int | None = None

    def begin_body(self, length_bytes: int | None) -> None:
        """To call once the head is parsed; `length_bytes` as the head announces it, if it does."""
        self._in_head = False
        self._body_left = length_bytes

    async def has_more(self) -> bool:
        """Whether the server sent more than it announced."""
        try:
            return bool(self._unread or await self._inner.read(1, timeout=CLOSE_GRACE_S))
        except (httpcore2.NetworkError, httpcore2.TimeoutException):
            return False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore2's
        """At most `max_bytes`: a line of the head, or what comes of the body and belongs to it."""
        if self._body_left is not None:
            max_bytes = max(1, min(max_bytes, self._body_left))
        data = self._unread or await self._inner.read(max_bytes, timeout=timeout)
        end = min(len(data), max_bytes)
        if self._in_head:
            end = min(end, data.find(b"\n") + 1 or end)
        data, self._unread = data[:end], data[end:]
        if self._body_left is not None:
            self._body_left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore2's
        """Sends all of `buffer`."""
        await self._inner.write(buffer, timeout=timeout)

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        """From here on encrypted; the certificate must be valid for `server_hostname`."""
        self._inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        return self

    def get_extra_info(self, info: str) -> object:
        """What the connection below knows."""
        return self._inner.get_extra_info(info)


class PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the first of the given addresses that answers, and resolves no name; for one request."""

    def __init__(self, addresses: Sequence[IPAddress]) -> None:
        self._addresses = addresses[:MAX_ADDRESSES]
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - what was resolved is what counts
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first address that answers within `timeout` seconds.

        Raises:
            httpcore2.ConnectError, httpcore2.ConnectTimeout: as the last address tried.
        """
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            try:
                inner = await self._inner.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return CheckedStream(inner)
        raise failure
