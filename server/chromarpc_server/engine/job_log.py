"""The sequenced event log of one job, and cursors over it.

Lives on the event loop: `append` and `follow` are called there and nowhere else. What a slow reader has not
read yet is bounded: progress and previews beyond a few are dropped, oldest first; facts, image bytes and the
terminal event never are.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from chromarpc_server.domain.events import (
    TERMINAL,
    Event,
    ImageChunk,
    Loading,
    Preview,
    Queued,
    Step,
    may_coalesce,
)

KEPT_UNREAD: dict[type[object], int] = {Queued: 1, Loading: 32, Step: 512, Preview: 4}
"""How many events of each coalescing kind the log keeps."""


@dataclass(frozen=True)
class LoggedEvent:
    """An event with its place in the log."""

    sequence: int
    time: datetime
    event: Event


class JobLog:
    """Events of one job, numbered from 1."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        """`on_end` is called once, with the terminal event in the log."""
        self._on_end = on_end
        self._ending: LoggedEvent | None = None
        self._image_bytes = 0
        self._entries: list[LoggedEvent] = []
        self._last_sequence = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._on_append: list[Callable[[Event], None]] = []
        self._on_read: list[Callable[[LoggedEvent], None]] = []

    def observe(self, on_append: Callable[[Event], None], on_read: Callable[[LoggedEvent], None]) -> None:
        """Has one function called with every event that is added, one with every event that a reader
        has taken that followed when it happened.
        """
        self._on_append.append(on_append)
        self._on_read.append(on_read)

    @property
    def closed(self) -> bool:
        """Whether the terminal event is in the log; nothing follows it."""
        return self._closed

    @property
    def ending(self) -> LoggedEvent | None:
        """The terminal event."""
        return self._ending

    @property
    def last_sequence(self) -> int:
        """Of the newest event; 0 where there is none."""
        return self._last_sequence

    @property
    def entries(self) -> tuple[LoggedEvent, ...]:
        """What is kept."""
        return tuple(self._entries)

    @property
    def image_bytes(self) -> int:
        """Of the images that are kept."""
        return self._image_bytes

    def append(self, event: Event) -> None:
        """Adds an event and wakes every follower. After a terminal event it does nothing."""
        if self._closed:
            return
        self._last_sequence += 1
        self._entries.append(LoggedEvent(self._last_sequence, datetime.now(UTC), event))
        self._closed = isinstance(event, TERMINAL)
        if isinstance(event, ImageChunk):
            self._image_bytes += len(event.data)
        self._coalesce(type(event))
        self._changed.set()
        self._changed = asyncio.Event()
        if self._closed:
            self._ending = self._entries[-1]
            self._on_end()
        for observe in self._on_append:
            observe(event)

    def _coalesce(self, kind: type[object]) -> None:
        limit = KEPT_UNREAD.get(kind)
        if limit is None:
            return
        droppable = [entry for entry in self._entries if type(entry.event) is kind and may_coalesce(entry.event)]
        for entry in droppable[:-limit]:
            self._entries.remove(entry)

    def _next_after(self, sequence: int) -> LoggedEvent | None:
        index = bisect_right(self._entries, sequence, key=lambda entry: entry.sequence)
        return self._entries[index] if index < len(self._entries) else None

    async def follow(
        self, after_sequence: int = 0, *, idle_s: float | None = None
    ) -> AsyncIterator[LoggedEvent | None]:
        """Yields events after `after_sequence` until the terminal one.

        Args:
            after_sequence: the last sequence the reader has.
            idle_s: yield None whenever nothing has happened for so many seconds.
        """
        sequence = after_sequence
        seen_before = self._last_sequence
        while True:
            changed = self._changed
            entry = self._next_after(sequence)
            if entry is None:
                if self._closed:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), idle_s)
                except TimeoutError:
                    yield None
                continue
            yield entry
            if entry.sequence > seen_before:
                for observe in self._on_read:
                    observe(entry)
            sequence = entry.sequence
