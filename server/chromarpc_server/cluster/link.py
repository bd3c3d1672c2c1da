"""Messages over a stream: each is two lengths, JSON, and the bytes that the JSON names."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from chromarpc_server.cluster.wire import FileOf, NotOurs, decode, encode

_LENGTHS = struct.Struct("!IIQ")
"""Of the JSON, how many blobs, and of all blobs together."""
_LENGTH = struct.Struct("!Q")
MAX_TEXT_BYTES = 64 * 1024**2
MAX_BLOB_BYTES = 256 * 1024**2
MAX_BLOBS = 4096
MAX_GREETING_BYTES = 64 * 1024
"""Of what somebody says before it is known who that is."""
_READ_BYTES = 256 * 1024


class Link:
    """One end of a connection. Lives on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads nothing yet."""
        self._reader = reader
        self._writer = writer
        self.file_of: FileOf | None = None
        """What files in messages are here."""
        self.on_bytes: Callable[[], None] = lambda: None
        """Called whenever something was read."""

    def send(self, message: object) -> None:
        """Hands a message to the connection, which may be gone; see `drain`."""
        text, blobs = encode(message)
        if self._writer.is_closing():
            return
        head = _LENGTHS.pack(len(text), len(blobs), sum(map(len, blobs)))
        lengths = b"".join(_LENGTH.pack(len(blob)) for blob in blobs)
        self._writer.write(b"".join((head, text, lengths, *blobs)))

    async def drain(self) -> None:
        """Waits until the connection takes more.

        Raises:
            OSError: it is gone.
        """
        await self._writer.drain()

    async def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone.
            OSError: the connection is.
            NotOurs: the other end sends what none of ours does.
        """
        text_bytes, blob_count, blob_bytes = _LENGTHS.unpack(await self._read(_LENGTHS.size))
        if text_bytes > MAX_TEXT_BYTES or blob_bytes > MAX_BLOB_BYTES or blob_count > MAX_BLOBS:
            raise NotOurs("a message is too long")
        text = await self._read(text_bytes)
        sizes = [_LENGTH.unpack(await self._read(_LENGTH.size))[0] for _ in range(blob_count)]
        if sum(sizes) != blob_bytes:
            raise NotOurs("a message has other lengths than it says")
        return decode(text, [await self._read(size) for size in sizes], self.file_of)

    def greet(self, greeting: dict[str, Any]) -> None:
        """Sends what comes before the first message: plain JSON, for an end of another version may read it."""
        text = json.dumps(greeting).encode()
        self._writer.write(_LENGTHS.pack(len(text), 0, 0) + text)

    async def greeting(self) -> dict[str, Any]:
        """What the other end says first.

        Raises:
            EOFError, OSError: it is gone.
            NotOurs: it is no greeting.
        """
        text_bytes, *blobs = _LENGTHS.unpack(await self._read(_LENGTHS.size))
        if text_bytes > MAX_GREETING_BYTES or any(blobs):
            raise NotOurs("a greeting is too long")
        try:
            greeting = json.loads(await self._read(text_bytes))
        except (ValueError, RecursionError):
            raise NotOurs("not a greeting") from None
        if not isinstance(greeting, dict):
            raise NotOurs("not a greeting")
        return greeting

    def abort(self) -> None:
        """Ends the connection at once, whatever is on its way."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Ends the connection once what was sent has left."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self, size: int) -> bytes:
        if size <= _READ_BYTES:
            data = await self._reader.readexactly(size)
            self.on_bytes()
            return data
        pieces = []
        while size:
            piece = await self._reader.readexactly(min(size, _READ_BYTES))
            self.on_bytes()
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)
