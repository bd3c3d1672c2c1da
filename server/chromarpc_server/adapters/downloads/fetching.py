"""Fetches the adapters that requests name by URL.

A URL comes from a client and is not trusted: only public addresses are reached (`public_http.addresses`), also by
redirects; sizes and times are bounded.
"""

from __future__ import annotations

import asyncio
import logging
import re

import httpx2

from chromarpc_server.adapters.content_store import room_on_disk
from chromarpc_server.adapters.downloads.cache import CachedFile, DownloadCache, Downloaded
from chromarpc_server.adapters.downloads.downloader import Downloader
from chromarpc_server.adapters.downloads.file_urls import file_url
from chromarpc_server.adapters.downloads.sharing import Progress, SharedDownload, SharedDownloads
from chromarpc_server.adapters.public_http.client import PublicClient, TransientError
from chromarpc_server.domain.adapter_urls import url_problem
from chromarpc_server.domain.errors import ChromaError, DiskFull, InvalidParameter, LoraDownloadFailed
from chromarpc_server.domain.limits import DownloadLimits

log = logging.getLogger(__name__)

TRIES = 3
MAX_RETRY_AFTER_S = 30.0
"""A host that asks for a longer pause is not waited for."""

_TOKEN = re.compile(r"[!-~]{1,512}")


class AdapterDownloads:
    """Files by their URLs. Belongs to one process and one event loop."""

    def __init__(self, cache: DownloadCache, client: PublicClient, limits: DownloadLimits | None = None) -> None:
        """Fetches nothing yet.

        Args:
            cache: gets the files.
            client: decides which hosts may be asked.
            limits: bytes of one file, and seconds of one download.
        """
        self._cache = cache
        self._client = client
        self._limits = limits or DownloadLimits()
        self._downloader = Downloader(client, cache, self._limits.file_bytes)
        self._in_progress = SharedDownloads(self._download, cache.release)

    async def fetch(self, url: str, *, token: str | None, field: str, progress: Progress) -> Downloaded:
        """The file behind `url`: from the network, or from the cache if the host says it is still the same.

        Calls for the same URL and token share one download, which ends early when the last of them is cancelled.

        Args:
            url: http or https; a Hugging Face page of a file stands for the file.
            token: Hugging Face token; it goes to that host alone, and by https alone.
            field: path of the request's field that every error blames.
            progress: called on the event loop.

        Raises:
            InvalidParameter: the URL may not be fetched, redirects to one that may not, or the file is too large.
            LoraNotFound: the host has no such file.
            LoraForbidden: the host wants a token, or another one.
            LoraInvalid: the answer is a web page, encoded, or empty.
            LoraDownloadFailed: no connection, a broken answer, another status, or a time limit passed.
            DiskFull: the disk has no room for it.
            OSError: the folder cannot be written.
        """
        source = self.require_fetchable(url, field)
        try:
            if token is not None and not _TOKEN.fullmatch(token):
                raise InvalidParameter("hf_token is not a token: only printable ASCII without spaces can be one")
            file = await self._in_progress.join(source, token, progress)
        except ChromaError as error:
            # Calls that share a download share its error: each blames its own field on a copy.
            raise type(error)(
                error.message, field=field, metadata=error.metadata, retry_after_s=error.retry_after_s
            ) from None
        return self._cache.lend(file)

    def require_fetchable(self, url: str, field: str) -> httpx2.URL:
        """Checks a URL as far as that is possible before its host is resolved; the URL of the file it stands for.

        Raises:
            InvalidParameter: blaming `field`; it may not be fetched. The message repeats nothing of the URL.
        """
        problem = url_problem(url)
        if problem is not None:
            raise InvalidParameter(problem, field=field)
        try:
            source = file_url(url)
            self._client.require_allowed(source)
        except InvalidParameter as error:
            raise InvalidParameter(error.message, field=field) from None
        return source

    async def _download(self, download: SharedDownload) -> CachedFile:
        """Tries again until the file is there, the time is up, or trying makes no sense."""
        tries, pause_s = 0, self._limits.backoff_s
        try:
            async with asyncio.timeout(self._limits.total_s):
                while True:
                    try:
                        with room_on_disk("this adapter"):
                            return await self._downloader.try_once(download)
                    except TransientError as error:
                        tries += 1
                        wait_s = max(pause_s, error.retry_after_s or 0.0)
                        if tries == TRIES or wait_s > MAX_RETRY_AFTER_S:
                            raise LoraDownloadFailed(error.message, retry_after_s=error.retry_after_s) from None
                        fields = {"host": download.url.host, "tries": tries, "problem": error.message}
                        log.warning("adapter.download_retried", extra=fields)
                    await asyncio.sleep(wait_s)
                    pause_s *= 2
        except TimeoutError:
            raise LoraDownloadFailed(f"the download took longer than {self._limits.total_s:g} s") from None
        except DiskFull:
            log.error("adapter.download_without_room", extra={"host": download.url.host})  # noqa: TRY400 - says it all
            raise
