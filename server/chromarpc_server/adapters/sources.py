"""Where the adapters of a request come from: files on this machine, found at once, or URLs, fetched later."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chromarpc_server.adapters.content_store import room_on_disk
from chromarpc_server.adapters.downloads.cache import Downloaded
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.file import AdapterFile, require_expected
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.root_hashes import WAIT_S
from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.events import Loading, LoadingStage
from chromarpc_server.domain.plan import PlannedLora

REPORT_EVERY_S = 0.2


@dataclass(frozen=True)
class FoundAdapters:
    """The adapters of a request as files, in order; downloads among them stay in their cache until `release`."""

    files: tuple[AdapterFile | None, ...]
    """None for a URL that was not fetched yet."""
    downloads: tuple[Downloaded, ...] = ()

    @property
    def complete(self) -> tuple[AdapterFile, ...]:
        """All of them, once every URL was fetched."""
        return tuple(file for file in self.files if file is not None)

    def release(self) -> None:
        """Lets downloaded files be evicted from their cache."""
        for download in self.downloads:
            download.release()


class AdapterSources:
    """Finds and fetches adapters. Lives on the event loop."""

    def __init__(self, library: AdapterLibrary, downloads: AdapterDownloads | None) -> None:
        """Touches nothing yet.

        Args:
            library: finds what paths and hashes name.
            downloads: fetches URLs; None fetches none.
        """
        self._library = library
        self._downloads = downloads

    async def find(
        self,
        loras: Sequence[PlannedLora],
        owner: str = NOBODY.name,
        *,
        first: int = 0,
        wait_s: float = WAIT_S,
    ) -> FoundAdapters:
        """Finds the adapters that are on this machine; those with a URL are left open.

        Args:
            loras: a request's, or some of them that follow one another.
            owner: whose request it is.
            first: index of the first of them among the request's, for error messages.
            wait_s: seconds to wait while files below the root are hashed, for each hash that is not known.

        Raises:
            LoraNotFound: the owner has no such file.
            LoraContentChanged: a file is known to be another than the request expects.
            InvalidParameter: a URL that this server does not fetch.
        """
        files: list[AdapterFile | None] = []
        for index, lora in enumerate(loras, first):
            field = f"loras.{index}.path"
            if not lora.is_url:
                file = await self._library.look_up(lora.path, field, owner, wait_s=wait_s)
                sha256 = self._library.known_hash(lora.path, file)
                if sha256 is not None:
                    require_expected(lora, sha256, index)
                files.append(file)
            elif self._downloads is None:
                raise InvalidParameter("this server fetches no adapters from URLs", field=field)
            else:
                self._downloads.require_fetchable(lora.path, field)
                files.append(None)
        return FoundAdapters(tuple(files))

    async def recall(self, path: str, is_it: Callable[[AdapterFile], bool]) -> None:
        """After a restart: what a path by hash named before it, known by what else is remembered of the file."""
        await asyncio.to_thread(self._library.recall, path, is_it)

    def stop_hashing(self) -> None:
        """Ends every wait for files to be hashed."""
        self._library.stop_hashing()

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
            loras: the request's.
            found: what `find` gave for them.
            token: Hugging Face token.
            emit: called with progress, a few times a second.
            owner: whose request it is; may name what was fetched by its hash from now on.

        Raises:
            LoraContentChanged: a file is another than the request expects.
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
                    files[index] = await asyncio.to_thread(
                        AdapterFile.of, download.path, field, sha256=download.sha256
                    )
                    with room_on_disk("this adapter"):
                        await asyncio.to_thread(self._library.add_download, download.sha256, owner)
            held.pop_all()
            return FoundAdapters(tuple(files), tuple(downloads))


class _Throttled:
    """Download progress as events: the first, the last, and a few a second between them."""

    def __init__(self, emit: Callable[[Loading], None]) -> None:
        self._emit = emit
        self._reported_at: float | None = None

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        now = time.monotonic()
        if self._reported_at is None or done_bytes == total_bytes or now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            self._emit(Loading(LoadingStage.DOWNLOADING, done_bytes, total_bytes or 0))
