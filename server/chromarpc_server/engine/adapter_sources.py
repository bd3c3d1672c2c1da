"""Where a job's adapters come from: files of the server's, found at once, or URLs, fetched before it may run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.events import Loading, LoadingStage
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.engine.adapter_cache import AdapterFile, require_expected
from chromarpc_server.engine.adapter_download import AdapterDownloads, Downloaded
from chromarpc_server.engine.adapter_library import AdapterLibrary

TELL_EVERY_S = 0.2


@dataclass(frozen=True)
class FoundAdapters:
    """A job's adapters as files, in order; downloads among them are held until `release`."""

    files: tuple[AdapterFile | None, ...]
    """None for a URL that was not fetched yet."""
    downloads: tuple[Downloaded, ...] = ()

    @property
    def complete(self) -> tuple[AdapterFile, ...]:
        """All of them, once every URL was fetched."""
        return tuple(file for file in self.files if file is not None)

    def release(self) -> None:
        """Downloaded files may leave their cache."""
        for download in self.downloads:
            download.release()


class AdapterSources:
    """Finds and fetches adapters. Lives on the event loop."""

    def __init__(self, library: AdapterLibrary, downloads: AdapterDownloads | None) -> None:
        """`library`: what plain paths and hashes name; `downloads` None fetches nothing."""
        self._library = library
        self._downloads = downloads

    async def find(
        self, loras: Sequence[PlannedLora], owner: str = NOBODY.name, *, first: int = 0
    ) -> FoundAdapters:
        """Everything of the owner's, and of everybody's, that is on this machine; URLs are left open.

        Args:
            loras: the job's, or some that follow one another.
            owner: whose job it is.
            first: which of the job's adapters the first of them is.

        Raises:
            LoraNotFound: no such file.
            LoraContentChanged: one is known to be another than the request expects.
            InvalidParameter: a URL, where this server fetches none.
        """
        files: list[AdapterFile | None] = []
        for index, lora in enumerate(loras, first):
            field = f"loras.{index}.path"
            if not lora.is_url:
                files.append(await asyncio.to_thread(self._look_at, lora, index, owner))
            elif self._downloads is None:
                raise InvalidParameter("this server fetches no adapters from URLs", field=field)
            else:
                files.append(None)
        return FoundAdapters(tuple(files))

    async def fetch(
        self,
        loras: Sequence[PlannedLora],
        found: FoundAdapters,
        *,
        token: str | None,
        emit: Callable[[Loading], None],
        owner: str = NOBODY.name,
    ) -> FoundAdapters:
        """Fetches what `find` left open, one after the other.

        Args:
            loras: the job's.
            found: what `find` gave for them.
            token: Hugging Face token.
            emit: told of progress.
            owner: may name what was fetched by its hash from now on.

        Raises:
            LoraContentChanged: one is another than the request expects.
            ChromaError: see `AdapterDownloads.fetch`.
        """
        if self._downloads is None:
            return found
        files = list(found.files)
        with contextlib.ExitStack() as held:
            downloads = []
            for index, lora in enumerate(loras):
                if files[index] is None:
                    field = f"loras.{index}.path"
                    download = await self._downloads.fetch(
                        lora.path, token=token, field=field, progress=_Throttled(emit)
                    )
                    downloads.append(held.enter_context(download))
                    require_expected(lora, download.sha256, index)
                    files[index] = await asyncio.to_thread(AdapterFile.of, download.path, field)
                    await asyncio.to_thread(self._library.fetched, download.sha256, owner)
            held.pop_all()
            return FoundAdapters(tuple(files), tuple(downloads))

    def _look_at(self, lora: PlannedLora, index: int, owner: str) -> AdapterFile:
        field = f"loras.{index}.path"
        file = AdapterFile.of(self._library.locate(lora.path, field, owner), field)
        sha256 = self._library.known_hash(lora.path, file)
        if sha256 is not None:
            require_expected(lora, sha256, index)
        return file


class _Throttled:
    """Download progress as events: the first, the last, and a few a second between them."""

    def __init__(self, emit: Callable[[Loading], None]) -> None:
        self._emit = emit
        self._told_at: float | None = None

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        now = time.monotonic()
        if self._told_at is None or done_bytes == total_bytes or now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            self._emit(Loading(LoadingStage.DOWNLOADING, done_bytes, total_bytes or 0))
