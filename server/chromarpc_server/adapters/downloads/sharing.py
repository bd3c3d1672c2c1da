"""Calls for the same URL and token share one download, which ends early when the last of them is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx2

from chromarpc_server.adapters.downloads.cache import CachedFile

Progress = Callable[[int, int | None], None]
"""Called with bytes done and, where the host says, bytes in all; starts over when a download is tried again."""


@dataclass(eq=False)
class SharedDownload:
    """One download and the calls that wait for it."""

    url: httpx2.URL = field(repr=False)
    token: str | None = field(repr=False)
    """Hugging Face token."""
    waiting: list[Progress] = field(default_factory=list)
    """One entry for each call."""

    def report(self, done_bytes: int, total_bytes: int | None) -> None:
        """Reports progress to every call that waits."""
        for progress in self.waiting:
            progress(done_bytes, total_bytes)


class SharedDownloads:
    """The downloads in progress. Belongs to one event loop."""

    def __init__(
        self,
        download: Callable[[SharedDownload], Coroutine[Any, Any, CachedFile]],
        release: Callable[[SharedDownload], None],
    ) -> None:
        """Starts nothing.

        Args:
            download: fetches the file, and has the cache keep it while calls wait.
            release: ends that; called when the last call leaves.
        """
        self._download = download
        self._release = release
        self._flights: dict[tuple[httpx2.URL, str | None], tuple[SharedDownload, asyncio.Task[CachedFile]]] = {}

    async def join(self, url: httpx2.URL, token: str | None, progress: Progress) -> CachedFile:
        """Waits for the one download of `url` with `token`; starts it where it is not in progress.

        Raises:
            ChromaError, OSError: as the download does; every call gets the same error.
        """
        key = (url, token)
        if key not in self._flights:
            shared = SharedDownload(url, token)
            task = asyncio.create_task(self._download(shared))
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._flights[key] = shared, task
        shared, task = self._flights[key]
        shared.waiting.append(progress)
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            shared.waiting.remove(progress)
            if (task.done() or not shared.waiting) and self._flights.get(key) == (shared, task):
                del self._flights[key]
            if not shared.waiting:
                try:
                    if not task.done():
                        task.cancel()
                        await asyncio.wait({task})
                finally:
                    self._release(shared)
