"""One try of a download: asks the host, checks its answer, and puts the body into the cache.

Of what the host answers only the file's bytes end up on disk. Whether they are an adapter is checked when the file
is read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from chromarpc_server.adapters.downloads.cache import CachedFile, DownloadCache, PartFile
from chromarpc_server.adapters.downloads.entity_tags import EntityTags, TaggedFile
from chromarpc_server.adapters.downloads.file_urls import is_hugging_face
from chromarpc_server.adapters.downloads.sharing import SharedDownload
from chromarpc_server.adapters.public_http.client import Answer, PublicClient, TransientError
from chromarpc_server.domain.errors import (
    InvalidParameter,
    LoraDownloadFailed,
    LoraError,
    LoraForbidden,
    LoraInvalid,
    LoraNotFound,
)

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
"""How much is hashed and written at once, off the event loop."""

_IS_HTML = "the URL leads to an HTML page, not to an adapter file"
_TRANSIENT = (429, 502, 503, 504)
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_STARTS = (b"<!doctype html", b"<html")


class Downloader:
    """Downloads files into a cache, each by one request. Belongs to one event loop."""

    def __init__(self, client: PublicClient, cache: DownloadCache, max_file_bytes: int) -> None:
        """Touches neither network nor disk.

        Args:
            client: decides which hosts may be asked.
            cache: gets the files.
            max_file_bytes: of one file.
        """
        self._client = client
        self._cache = cache
        self._max_file_bytes = max_file_bytes
        self._entity_tags = EntityTags()

    async def try_once(self, download: SharedDownload) -> CachedFile:
        """The file, held in the cache for `download`; from the network, unless its host says that it is the same.

        Raises:
            TransientError: trying again may help.
            DiskFull: too little would be left on the disk.
            ChromaError: trying again does not help; see `AdapterDownloads.fetch`.
            OSError: the folder cannot be written.
        """
        headers = {
            "User-Agent": "chromarpc-server",
            "Accept": "application/octet-stream, */*",
            "Accept-Encoding": "identity",
        }
        known = self._entity_tags.get(download.url)
        if known is not None and not await self._hold_whole(download, known.sha256):
            known = None
        if known is not None:
            headers["If-None-Match"] = known.etag
        secret_headers = {}
        if download.token is not None and download.url.scheme == "https" and is_hugging_face(download.url.host):
            secret_headers["Authorization"] = f"Bearer {download.token}"
        async with self._client.get(download.url, headers, secret_headers) as answer:
            return await self._receive(download, answer, known)

    async def _receive(self, download: SharedDownload, answer: Answer, known: TaggedFile | None) -> CachedFile:
        """Puts the answer's body into the cache; what is there already, if the host says so."""
        started = time.monotonic()
        if answer.status == 304 and known is not None:
            return self._cache.use(download, known.sha256)
        _require_file(answer)
        total = _length_bytes(answer.headers)
        if total is not None and total > self._max_file_bytes:
            raise self._too_large()
        with self._cache.part_file(total or 0) as part:
            await self._copy(download, answer, total, part)
            await asyncio.to_thread(part.sync)
            if part.size_bytes == 0:
                raise LoraInvalid("the URL leads to an empty file")
            sha256 = self._cache.keep(download, part)
            await asyncio.to_thread(self._cache.add, part)
        self._entity_tags.remember(download.url, answer.headers.get("etag", ""), sha256)
        file = self._cache.use(download, sha256)
        await asyncio.to_thread(self._cache.evict)
        fields = {"host": download.url.host, "sha256": sha256, "size_bytes": file.size_bytes}
        log.info("adapter.downloaded", extra={**fields, "seconds": round(time.monotonic() - started, 3)})
        return file

    async def _hold_whole(self, download: SharedDownload, sha256: str) -> bool:
        """Keeps the file with this hash, where it is there and still has its bytes."""
        return self._cache.hold(download, sha256) and await asyncio.to_thread(self._cache.is_whole, sha256)

    async def _copy(self, download: SharedDownload, answer: Answer, total: int | None, part: PartFile) -> None:
        """Writes the body block by block, exactly `total` bytes if the head announced them."""
        answer.stream.begin_body(total)
        download.report(0, total)
        done, block = 0, bytearray()
        async for chunk in answer.body:
            done += len(chunk)
            if done > self._max_file_bytes:
                raise self._too_large()
            block += chunk
            if len(block) >= BLOCK_BYTES:
                await _write(part, block)
                download.report(done, total)
            if done == total and await answer.stream.has_more():
                raise LoraDownloadFailed("the adapter's host sent more than the length it announced")
        await _write(part, block)
        download.report(done, total)

    def _too_large(self) -> InvalidParameter:
        return InvalidParameter(f"the adapter is larger than the {self._max_file_bytes} bytes that are allowed")


async def _write(part: PartFile, block: bytearray) -> None:
    """Writes `block` off the event loop, and empties it.

    Raises:
        LoraInvalid: the file begins as a web page does.
    """
    if part.size_bytes == 0 and block.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower().startswith(_HTML_STARTS):
        raise LoraInvalid(_IS_HTML)
    await asyncio.to_thread(part.write, bytes(block))
    block.clear()


def _require_file(answer: Answer) -> None:
    """Checks that an answer has status 200 and a body that is a file as it is.

    Raises:
        LoraError: it has not; see `AdapterDownloads.fetch`.
        TransientError: trying again may help.
    """
    status, headers = answer.status, answer.headers
    errors: dict[int, LoraError] = {
        401: LoraForbidden("the adapter's host wants a token that may read it (401), or has no such file"),
        403: LoraForbidden(
            "the adapter's host does not give this file out (403): it may be gated, or the token wrong"
        ),
        404: LoraNotFound("the adapter's host has no such file (404)"),
        410: LoraNotFound("the adapter's host no longer has this file (410)"),
    }
    if status in errors:
        raise errors[status]
    if status in _TRANSIENT:
        raise TransientError(f"the adapter's host is busy or failing ({status})", _retry_after_s(headers))
    if status != 200:
        raise LoraDownloadFailed(f"the adapter's host answers with status {status}")
    if headers.get("content-type", "").partition(";")[0].strip().lower() in _HTML_TYPES:
        raise LoraInvalid(_IS_HTML)
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise LoraInvalid("the adapter's host sends the file encoded although it was asked not to")


def _length_bytes(headers: httpx2.Headers) -> int | None:
    """Of the body as announced; None if it ends with its last chunk, or with the connection."""
    return (
        int(headers["content-length"])
        if "content-length" in headers and "transfer-encoding" not in headers
        else None
    )


def _retry_after_s(headers: httpx2.Headers) -> float | None:
    """The pause a host asks for in seconds, whether it gives seconds or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
