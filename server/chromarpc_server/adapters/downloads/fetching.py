"""Downloads adapters that a request names by URL into a folder of files named by their SHA-256.

A URL comes from a client and is not trusted: only public addresses are reached (`public_address`), on every
hop; sizes and times are bounded; nothing the host answers but bytes ends up on disk. Whether those bytes are an
adapter is for whoever reads the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import ssl
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpx2

from chromarpc_server.adapters.public_http.client import (
    Answer,
    IPAddress,
    PublicClient,
    Resolve,
    TransientError,
    is_public,
    resolve,
)
from chromarpc_server.domain.adapter_urls import url_problem
from chromarpc_server.domain.errors import (
    ChromaError,
    InvalidParameter,
    LoraDownloadFailed,
    LoraError,
    LoraForbidden,
    LoraInvalid,
    LoraNotFound,
)
from chromarpc_server.domain.limits import DownloadLimits

log = logging.getLogger(__name__)

TRIES = 3
MAX_RETRY_AFTER_S = 30.0
"""A host that asks for a longer pause is not waited for."""
BLOCK_BYTES = 1 << 20
"""How much is hashed and written at once, off the event loop."""
MAX_REMEMBERED_URLS = 4096

_IS_HTML = "the URL leads to an HTML page, not to an adapter file"
_TRANSIENT = (429, 502, 503, 504)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_STARTS = (b"<!doctype html", b"<html")
_FILE_PAGE = re.compile(rb"^(/(?:datasets/|spaces/)?[^/?]+(?:/[^/?]+)?)/blob/")
_STRONG_ETAG = re.compile(r'"[!#-~]*"')
_TOKEN = re.compile(r"[!-~]{1,512}")

Progress = Callable[[int, int | None], None]
"""Told of bytes done and, where the host says, bytes in all; starts over when a download is tried again."""


@dataclass(frozen=True, eq=False)
class Downloaded:
    """A file in the cache, which stays there until `release`; a context manager that releases at its end."""

    path: Path
    sha256: str
    """64 lower-case hexadecimal digits."""
    size_bytes: int
    _leases: dict[object, str] = field(repr=False)

    def release(self) -> None:
        """The file may go when room is needed. Any thread may call this, and more than once."""
        self._leases.pop(self, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class _Stored:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class _Known:
    """What a URL gave last."""

    etag: str
    sha256: str


@dataclass(eq=False)
class _Flight:
    """One download and the calls that wait for it."""

    url: httpx2.URL = field(repr=False)
    token: str | None = field(repr=False)
    waiting: list[Progress] = field(default_factory=list)

    def tell(self, done_bytes: int, total_bytes: int | None) -> None:
        for progress in self.waiting:
            progress(done_bytes, total_bytes)


class AdapterDownloads:
    """A folder of downloaded adapters, `<sha256>.safetensors`; belongs to one process and one event loop."""

    def __init__(
        self,
        folder: Path,
        limits: DownloadLimits | None = None,
        *,
        allowed_hosts: Collection[str] = (),
        resolve: Resolve = resolve,
        is_allowed: Callable[[IPAddress], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Makes the folder, and removes what an interrupted download left in it.

        Args:
            folder: where the files are.
            limits: bytes and seconds.
            allowed_hosts: names, or `*.example.org` for every name below one; none allows every public host on
                ports 80 and 443. Redirects obey it too.
            resolve: gives every address of a host.
            is_allowed: the rule that every address must pass.
            ssl_context: trusted certificates; those that the system trusts if None.
        """
        self._folder = folder
        self._limits = limits or DownloadLimits()
        self._client = PublicClient(
            connect_s=self._limits.connect_s,
            read_s=self._limits.read_s,
            allowed_hosts=allowed_hosts,
            resolve=resolve,
            is_allowed=is_allowed,
            ssl_context=ssl_context,
        )
        self._flights: dict[tuple[httpx2.URL, str | None], tuple[_Flight, asyncio.Task[_Stored]]] = {}
        self._leases: dict[object, str] = {}
        self._known: dict[httpx2.URL, _Known] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob("*.part"):
            abandoned.unlink(missing_ok=True)

    async def fetch(self, url: str, *, token: str | None, field: str, progress: Progress) -> Downloaded:
        """The file behind `url`: from the network, or from the folder if the host says it is still the same.

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
            LoraDownloadFailed: no connection, a broken answer, another status, a time limit passed, or the disk is
                full.
            OSError: the folder cannot be written.
        """
        source = self.require_fetchable(url, field)
        try:
            if token is not None and not _TOKEN.fullmatch(token):
                raise InvalidParameter("hf_token is not a token: only printable ASCII without spaces can be one")
            stored = await self._join(source, token, progress)
        except ChromaError as error:
            # Calls that share a download share its error: each blames its own field on a copy.
            raise type(error)(error.message, field=field, retry_after_s=error.retry_after_s) from None
        file = Downloaded(self._path(stored.sha256), stored.sha256, stored.size_bytes, self._leases)
        self._leases[file] = stored.sha256
        return file

    def require_fetchable(self, url: str, field: str) -> httpx2.URL:
        """The URL of the file that `url` stands for, as far as can be judged before its host is asked for.

        Raises:
            InvalidParameter: blaming `field`; it may not be fetched. Never repeats any of it.
        """
        problem = url_problem(url)
        if problem is not None:
            raise InvalidParameter(problem, field=field)
        try:
            source = _file_url(url)
            self._client.check(source)
        except InvalidParameter as error:
            raise InvalidParameter(error.message, field=field) from None
        return source

    async def _join(self, url: httpx2.URL, token: str | None, progress: Progress) -> _Stored:
        """Waits for the one download of `url`, which keeps its file from leaving while anyone waits."""
        key = (url, token)
        if key not in self._flights:
            flight = _Flight(url, token)
            task = asyncio.create_task(self._fly(flight))
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._flights[key] = flight, task
        flight, task = self._flights[key]
        flight.waiting.append(progress)
        try:
            await asyncio.wait({task})
            return task.result()
        finally:
            flight.waiting.remove(progress)
            if (task.done() or not flight.waiting) and self._flights.get(key) == (flight, task):
                del self._flights[key]
            if not flight.waiting:
                try:
                    if not task.done():
                        task.cancel()
                        await asyncio.wait({task})
                finally:
                    self._leases.pop(flight, None)

    async def _fly(self, flight: _Flight) -> _Stored:
        """Tries until the file is there, the time is up, or trying makes no sense."""
        tries, pause_s = 0, self._limits.backoff_s
        try:
            async with asyncio.timeout(self._limits.total_s):
                while True:
                    try:
                        return await self._attempt(flight)
                    except TransientError as error:
                        tries += 1
                        wait_s = max(pause_s, error.retry_after_s or 0.0)
                        if tries == TRIES or wait_s > MAX_RETRY_AFTER_S:
                            raise LoraDownloadFailed(error.message, retry_after_s=error.retry_after_s) from None
                        fields = {"host": flight.url.host, "tries": tries, "problem": error.message}
                        log.warning("adapter.download_retried", extra=fields)
                    await asyncio.sleep(wait_s)
                    pause_s *= 2
        except TimeoutError:
            raise LoraDownloadFailed(f"the download took longer than {self._limits.total_s:g} s") from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            log.error("adapter.download_without_room", extra={"host": flight.url.host})  # noqa: TRY400 - says it all
            raise LoraDownloadFailed("the server's disk has no room for this adapter") from None

    async def _attempt(self, flight: _Flight) -> _Stored:
        """One try, over all redirects."""
        headers = {
            "User-Agent": "chromarpc-server",
            "Accept": "application/octet-stream, */*",
            "Accept-Encoding": "identity",
        }
        known = self._hold_known(flight)
        if known is not None:
            headers["If-None-Match"] = known.etag
        secret_headers = {}
        if flight.token is not None and flight.url.scheme == "https" and _is_hugging_face(flight.url.host):
            secret_headers["Authorization"] = f"Bearer {flight.token}"
        async with self._client.get(flight.url, headers, secret_headers) as answer:
            return await self._receive(flight, answer, known)

    async def _receive(self, flight: _Flight, answer: Answer, known: _Known | None) -> _Stored:
        """Puts the answer's body into the folder; what is there already, if the host says so."""
        started = time.monotonic()
        if answer.status == 304 and known is not None:
            return self._use(flight, known.sha256)
        _check_status(answer)
        total = _length_bytes(answer.headers)
        if total is not None and total > self._limits.file_bytes:
            raise self._too_large()
        with _part_file(self._folder) as part:
            await self._copy(flight, answer, total, part)
            await asyncio.to_thread(part.sync)
            if part.size_bytes == 0:
                raise LoraInvalid("the URL leads to an empty file")
            sha256 = part.digest.hexdigest()
            if not self._path(sha256).exists():
                part.path.replace(self._path(sha256))
        self._remember(flight.url, answer.headers.get("etag", ""), sha256)
        stored = self._use(flight, sha256)
        self._make_room()
        fields = {"host": flight.url.host, "sha256": sha256, "size_bytes": stored.size_bytes}
        log.info("adapter.downloaded", extra={**fields, "seconds": round(time.monotonic() - started, 3)})
        return stored

    async def _copy(self, flight: _Flight, answer: Answer, total: int | None, part: _PartFile) -> None:
        """Writes the body block by block, exactly `total` bytes if the head announced them."""
        answer.stream.begin_body(total)
        flight.tell(0, total)
        done, block = 0, bytearray()
        async for chunk in answer.body:
            done += len(chunk)
            if done > self._limits.file_bytes:
                raise self._too_large()
            block += chunk
            if len(block) >= BLOCK_BYTES:
                await _write(part, block)
                flight.tell(done, total)
            if done == total and await answer.stream.has_more():
                raise LoraDownloadFailed("the adapter's host sent more than the length it announced")
        await _write(part, block)
        flight.tell(done, total)

    def _too_large(self) -> InvalidParameter:
        return InvalidParameter(f"the adapter is larger than the {self._limits.file_bytes} bytes that are allowed")

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"

    def _use(self, flight: _Flight, sha256: str) -> _Stored:
        """Keeps the file while the flight has waiters. Its change time stays: other caches go by that."""
        self._leases[flight] = sha256
        status = self._path(sha256).stat()
        os.utime(self._path(sha256), ns=(time.time_ns(), status.st_mtime_ns))
        return _Stored(sha256, status.st_size)

    def _hold_known(self, flight: _Flight) -> _Known | None:
        """What the URL gave last, if its file is still there; it stays until the answer has come."""
        known = self._known.get(flight.url)
        if known is None or not self._path(known.sha256).exists():
            return None
        self._leases[flight] = known.sha256
        return known

    def _remember(self, url: httpx2.URL, etag: str, sha256: str) -> None:
        self._known.pop(url, None)
        if _STRONG_ETAG.fullmatch(etag):
            self._known[url] = _Known(etag, sha256)
        if len(self._known) > MAX_REMEMBERED_URLS:
            del self._known[next(iter(self._known))]

    def _make_room(self) -> None:
        """Removes the files used longest ago until the rest is within bounds, but none that is in use."""
        files = [(path.stat(), path) for path in self._folder.glob("*.safetensors")]
        excess = sum(status.st_size for status, _ in files) - self._limits.cache_bytes
        in_use = set(self._leases.values())
        for status, path in sorted(files, key=lambda file: file[0].st_atime_ns):
            if excess <= 0:
                break
            if path.stem not in in_use:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                excess -= status.st_size


@dataclass
class _PartFile:
    """A file that is being received."""

    path: Path
    file: BinaryIO
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size_bytes: int = 0

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)
        self.size_bytes += len(block)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def _part_file(folder: Path) -> Iterator[_PartFile]:
    """A new file in `folder` that is gone at the end unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield _PartFile(Path(name), file)
    finally:
        Path(name).unlink(missing_ok=True)


async def _write(part: _PartFile, block: bytearray) -> None:
    """Writes `block` off the event loop, and empties it.

    Raises:
        LoraInvalid: the file begins as a web page does.
    """
    if part.size_bytes == 0 and block.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower().startswith(_HTML_STARTS):
        raise LoraInvalid(_IS_HTML)
    await asyncio.to_thread(part.write, bytes(block))
    block.clear()


def _file_url(text: str) -> httpx2.URL:
    """The URL of the file that a client means.

    Raises:
        InvalidParameter: this is no URL.
    """
    try:
        url = httpx2.URL(text).copy_with(fragment=None)
        url = url.copy_with(host=url.host.removesuffix("."))
        if url.host == "hf.co":
            url = url.copy_with(host="huggingface.co")
        if _is_hugging_face(url.host):
            url = url.copy_with(raw_path=_FILE_PAGE.sub(rb"\1/resolve/", url.raw_path))
    except (httpx2.InvalidURL, ValueError):
        raise InvalidParameter("this is not a URL that can be fetched") from None
    return url


def _is_hugging_face(host: str) -> bool:
    return host == "huggingface.co" or host.endswith(".huggingface.co")


def _check_status(answer: Answer) -> None:
    """Passes 200 with a body that is a file as it is.

    Raises:
        LoraError: as `AdapterDownloads.fetch` says.
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
