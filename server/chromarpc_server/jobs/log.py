"""The sequenced event log of one job, and cursors over it.

Lives on the event loop: `append` and `follow` are called there and nowhere else. What a slow reader has not
read yet is bounded: progress and previews beyond a few are dropped, oldest first; facts, image bytes and the
terminal event never are. The terminal event has its number before it is stored (`seal`), and readers see it
after (`close`).
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.events import (
    Accepted,
    Event,
    ImageChunk,
    ImageHeader,
    Loading,
    Preview,
    Queued,
    Restarted,
    Step,
    Terminal,
    may_coalesce,
)

KEPT_UNREAD: dict[type[object], int] = {Queued: 1, Loading: 32, Step: 512, Preview: 4}
"""How many events of each coalescing kind the log keeps."""


@dataclass(frozen=True)
class StoredChunk:
    """A part of an image whose bytes are in the store."""

    prompt_index: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class LoggedEvent:
    """An event with its place in the log."""

    sequence: int
    time: datetime
    event: Event
    _encoded: list[bytes] = field(default_factory=list, repr=False, compare=False)

    def encoded(self, encode: Callable[[LoggedEvent], bytes]) -> bytes:
        """The event as its readers get it, made once for all of them; image bytes are not kept twice."""
        if self._encoded:
            return self._encoded[0]
        made = encode(self)
        if not isinstance(self.event, ImageChunk):
            self._encoded.append(made)
        return made


StoredImage = Callable[[int, int], Awaitable[bytes]]
"""Reads a part of an image that was found good: its offset and size, in bytes."""


@dataclass(frozen=True)
class StoredEvent:
    """The same, out of the store."""

    sequence: int
    time: datetime
    event: Event | StoredChunk


class JobLog:
    """Events of one job that has not ended, numbered from 1."""

    def __init__(self) -> None:
        self._ending: LoggedEvent | None = None
        self._suspended: ChromaError | None = None
        self._entries: list[LoggedEvent] = []
        self._last_sequence = 0
        self._waiters: list[asyncio.Future[bool]] = []
        self._closed = False
        self._on_append: list[Callable[[Event], None]] = []
        self._on_read: list[Callable[[LoggedEvent], None]] = []

    def observe(self, on_append: Callable[[Event], None], on_read: Callable[[LoggedEvent], None]) -> None:
        """Has one function called with every event that readers may see, one with every event that a reader
        has taken that followed when it happened.
        """
        self._on_append.append(on_append)
        self._on_read.append(on_read)

    @property
    def sealed(self) -> bool:
        """Whether the terminal event is decided, if not yet for readers to see."""
        return self._ending is not None

    @property
    def closed(self) -> bool:
        """Whether the terminal event is in the log; nothing follows it."""
        return self._closed

    @property
    def suspended(self) -> bool:
        """Whether nothing more will come although the job has not ended."""
        return self._suspended is not None

    @property
    def ending(self) -> LoggedEvent | None:
        """The terminal event, once readers may see it."""
        return self._ending if self._closed else None

    @property
    def last_sequence(self) -> int:
        """Of the newest event; 0 where there is none."""
        return self._last_sequence

    @property
    def entries(self) -> tuple[LoggedEvent, ...]:
        """What is kept, the terminal event included once it is decided."""
        sealed = self._ending is not None and not self._closed
        return (*self._entries, self._ending) if sealed and self._ending else tuple(self._entries)

    @property
    def headers(self) -> tuple[ImageHeader, ...]:
        """What images there are so far, in the order of prompts."""
        found = (entry.event for entry in self._entries if isinstance(entry.event, ImageHeader))
        return tuple(sorted(found, key=lambda header: header.prompt_index))

    def append(self, event: Event) -> None:
        """Adds an event and wakes every follower. Once the end is decided it does nothing."""
        if self._ending is not None:
            return
        if isinstance(event, Terminal):
            self.seal(event)
            self.close()
            return
        self._last_sequence += 1
        self._add(LoggedEvent(self._last_sequence, datetime.now(UTC), event))

    def skip_to(self, sequence: int) -> None:
        """Numbers what follows from `sequence` + 1 on: of a job that is run again after a restart, no number
        may come twice.
        """
        self._last_sequence = max(self._last_sequence, sequence)

    def begin_anew(self, event: Restarted) -> None:
        """Drops all but what was admitted: the attempt that it tells of came to nothing. Its numbers are not given
        again, and readers go on with `event`. Once the end is decided it does nothing.
        """
        if self._ending is None:
            self._entries = [entry for entry in self._entries if isinstance(entry.event, Accepted)]
            self.append(event)

    def seal(self, event: Terminal) -> LoggedEvent:
        """Decides on the terminal event. Replaces an earlier decision that readers have not seen.

        Raises:
            ValueError: they have.
        """
        if self._closed:
            raise ValueError("the log is closed")
        self._ending = LoggedEvent(self._last_sequence + 1, datetime.now(UTC), event)
        return self._ending

    def unseal(self) -> None:
        """Takes back a decision that readers have not seen."""
        if not self._closed:
            self._ending = None

    def close(self) -> None:
        """Lets readers see the end.

        Raises:
            ValueError: no end was decided.
        """
        if self._ending is None:
            raise ValueError("the log is not sealed")
        if not self._closed:
            self._closed = True
            self._last_sequence = self._ending.sequence
            self._add(self._ending)

    def suspend(self, error: ChromaError) -> None:
        """Ends every follower with `error`, once it has read everything: this process will add no more events."""
        self._suspended = error
        self._wake()

    def _add(self, entry: LoggedEvent) -> None:
        self._entries.append(entry)
        self._coalesce(type(entry.event))
        self._wake()
        for observe in self._on_append:
            observe(entry.event)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            _resolve(waiter, True)

    async def _wait(self, idle: _IdleTimer | None) -> bool:
        """Returns True once something has happened, False once nothing has happened for too long."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if idle is not None:
            idle.begin(waiter)
        try:
            if await waiter:
                return True
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
        if waiter not in self._waiters:
            return True  # something has happened after all, before this task came to run
        self._waiters.remove(waiter)
        return False

    def _coalesce(self, kind: type[object]) -> None:
        limit = KEPT_UNREAD.get(kind)
        if limit is None:
            return
        droppable = [entry for entry in self._entries if type(entry.event) is kind and may_coalesce(entry.event)]
        for entry in droppable[:-limit]:
            self._entries.remove(entry)

    def _next_after(self, sequence: int) -> LoggedEvent | None:
        entries = self._entries
        if not entries or entries[-1].sequence <= sequence:  # most readers have everything, or all but the newest
            return None
        if len(entries) > 1 and entries[-2].sequence <= sequence:
            return entries[-1]
        return entries[bisect_right(entries, sequence, key=lambda entry: entry.sequence)]

    async def follow(
        self, after_sequence: int = 0, *, idle_s: float | None = None, omit_image_bytes: bool = False
    ) -> AsyncIterator[LoggedEvent | None]:
        """Yields events after `after_sequence` until the terminal one.

        Args:
            after_sequence: the last sequence the reader has.
            idle_s: yield None whenever nothing has happened for so many seconds.
            omit_image_bytes: leave out every `ImageChunk`.

        Raises:
            ChromaError: this process will say no more of the job, which has not ended.
        """
        sequence = after_sequence
        seen_before = self._last_sequence
        idle = None if idle_s is None else _IdleTimer(idle_s)
        try:
            while True:
                entry = self._next_after(sequence)
                if entry is None:
                    if self._closed:
                        return
                    if self._suspended is not None and self._ending is None:
                        raise self._suspended
                    if not await self._wait(idle):
                        yield None
                    continue
                sequence = entry.sequence
                if omit_image_bytes and isinstance(entry.event, ImageChunk):
                    continue
                yield entry
                if entry.sequence > seen_before:
                    for observe in self._on_read:
                        observe(entry)
        finally:
            if idle is not None:
                idle.end()

    async def image_chunks(self, prompt_index: int, offset_bytes: int = 0) -> AsyncIterator[ImageChunk]:
        """An image's bytes from an offset on; nothing where they are not all here."""
        for entry in self.entries:
            chunk = entry.event
            if isinstance(chunk, ImageChunk) and chunk.prompt_index == prompt_index:
                skipped = max(0, offset_bytes - chunk.offset_bytes)
                if skipped < len(chunk.data):
                    yield ImageChunk(prompt_index, chunk.offset_bytes + skipped, chunk.data[skipped:])

    def has_image(self, header: ImageHeader) -> bool:
        """Whether all its bytes are here."""
        chunks = (entry.event for entry in self._entries if isinstance(entry.event, ImageChunk))
        have = sum(len(chunk.data) for chunk in chunks if chunk.prompt_index == header.prompt_index)
        return have == header.size_bytes


def _resolve(waiter: asyncio.Future[bool], happened: bool) -> None:
    if not waiter.done():
        waiter.set_result(happened)


class _IdleTimer:
    """Ends a reader's wait in which nothing happens for too long.

    A reader waits for each event anew, and nearly always briefly: one timer that is put off when it rings early
    costs a hundred readers less than one timer a wait, made and cancelled.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._waiter: asyncio.Future[bool] | None = None
        self._begun_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, waiter: asyncio.Future[bool]) -> None:
        """The reader waits from now on; the waiter is given False `idle_s` later, unless it was given True."""
        loop = waiter.get_loop()
        self._waiter, self._begun_s = waiter, loop.time()
        if self._timer is None:
            self._timer = loop.call_at(self._begun_s + self._idle_s, self._ring)

    def end(self) -> None:
        """The reader waits no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._waiter = None

    def _ring(self) -> None:
        waiter, self._timer = self._waiter, None
        if waiter is None or waiter.done():  # the next wait sets it again
            return
        loop = waiter.get_loop()
        due_s = self._begun_s + self._idle_s
        if loop.time() < due_s:
            self._timer = loop.call_at(due_s, self._ring)
        else:
            _resolve(waiter, False)


class EndedLog:
    """The log of a job that ended, out of the store; read only when somebody follows it."""

    sealed = True
    closed = True
    suspended = False

    def __init__(
        self,
        ending: LoggedEvent,
        headers: tuple[ImageHeader, ...],
        *,
        load: Callable[[], Awaitable[tuple[StoredEvent, ...]]],
        open_image: Callable[[ImageHeader], Awaitable[StoredImage]],
        chunk_bytes: int,
    ) -> None:
        """`load` gets all events; `open_image` looks at all of an image before any of it is read."""
        self.ending = ending
        self.headers = headers
        self._load = load
        self._open_image = open_image
        self._chunk_bytes = chunk_bytes

    @property
    def last_sequence(self) -> int:
        """Of the terminal event."""
        return self.ending.sequence

    async def follow(
        self,
        after_sequence: int = 0,
        *,
        idle_s: float | None = None,  # noqa: ARG002 - an ended log never idles
        omit_image_bytes: bool = False,
    ) -> AsyncIterator[LoggedEvent | None]:
        """As `JobLog.follow`; never waits.

        Raises:
            JobNotFound: the job was deleted meanwhile.
            ImageDamaged, JobDamaged: an image, or the events, are not what was stored.
        """
        headers = {header.prompt_index: header for header in self.headers}
        opened: dict[int, StoredImage] = {}
        for entry in await self._load():
            event = entry.event
            if entry.sequence <= after_sequence:
                continue
            if isinstance(event, StoredChunk):
                if omit_image_bytes:
                    continue
                index = event.prompt_index
                if index not in opened:
                    opened[index] = await self._open_image(headers[index])
                data = await opened[index](event.offset_bytes, event.size_bytes)
                event = ImageChunk(index, event.offset_bytes, data)
            yield LoggedEvent(entry.sequence, entry.time, event)

    async def image_chunks(self, prompt_index: int, offset_bytes: int = 0) -> AsyncIterator[ImageChunk]:
        """An image's bytes from an offset on.

        Raises:
            JobNotFound: the job was deleted meanwhile.
            ImageDamaged: the image is not what was stored; said before the first byte wherever that can be known.
        """
        header = next(header for header in self.headers if header.prompt_index == prompt_index)
        read = await self._open_image(header)
        for offset in range(offset_bytes, header.size_bytes, self._chunk_bytes):
            size = min(self._chunk_bytes, header.size_bytes - offset)
            yield ImageChunk(prompt_index, offset, await read(offset, size))

    def has_image(self, header: ImageHeader) -> bool:
        """Whether its bytes are kept."""
        return header in self.headers
