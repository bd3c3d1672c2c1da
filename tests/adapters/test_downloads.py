"""Adapters by URL: what is fetched, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from pathlib import Path

import pytest

from chromarpc_server.adapters.downloads.cache import PartFile
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.domain.errors import (
    ChromaError,
    DiskFull,
    InvalidParameter,
    LoraDownloadFailed,
    LoraForbidden,
    LoraInvalid,
    LoraNotFound,
)
from chromarpc_server.domain.limits import DownloadLimits
from tests.adapters.file_hosts import BODY, FIELD, Writes, answer, fetch, files, make, refused, serving, trickle


async def test_a_file_is_stored_under_its_sha256_and_progress_is_told(
    downloads: AdapterDownloads, tmp_path: Path
) -> None:
    told: list[tuple[int, int | None]] = []
    async with serving() as host:
        host.on("/style.safetensors", answer())
        file = await downloads.fetch(
            host.url("/style.safetensors?download=true"),
            token=None,
            field=FIELD,
            progress=lambda done, total: told.append((done, total)),
        )
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert (file.sha256, file.size_bytes) == (sha256, len(BODY))
    assert file.path == tmp_path / f"{sha256}.safetensors"
    assert file.path.read_bytes() == BODY
    assert files(tmp_path) == {file.path.name}
    assert told[0] == (0, len(BODY))
    assert told[-1] == (len(BODY), len(BODY))
    (request,) = host.seen
    assert request.target == "/style.safetensors?download=true"
    assert request.headers["host"] == f"adapters.example:{host.port}"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers


async def test_a_large_file_in_many_blocks_arrives_whole(tmp_path: Path) -> None:
    body = os.urandom(3_300_001)
    downloads = make(tmp_path, DownloadLimits())
    async with serving() as host:
        host.on("/large", answer(body))
        assert (await fetch(downloads, host.url("/large"))).path.read_bytes() == body


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("/someone/style/blob/main/a.safetensors?x=1", "/someone/style/resolve/main/a.safetensors?x=1"),
        ("/style/blob/main/blob/a", "/style/resolve/main/blob/a"),
        ("/datasets/a/b/blob/main/c", "/datasets/a/b/resolve/main/c"),
        ("/a/b/resolve/main/blob/c", "/a/b/resolve/main/blob/c"),
        ("/a/b/c?next=/b/blob/c", "/a/b/c?next=/b/blob/c"),
    ],
)
async def test_a_hugging_face_page_stands_for_its_file(downloads: AdapterDownloads, page: str, file: str) -> None:
    async with serving() as host:
        host.on(file.partition("?")[0], answer())
        await fetch(downloads, host.url(page, "huggingface.co"))
        await fetch(downloads, host.url(page, "hf.co."))
    assert [request.target for request in host.seen] == [file, file]


async def test_a_page_elsewhere_is_left_as_it_is(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a/b/blob/main/c", answer())
        await fetch(downloads, host.url("/a/b/blob/main/c"))


@pytest.mark.parametrize(
    "reply",
    [
        answer(b"<p>", Content_Type="text/html; charset=utf-8"),
        answer(b"\n <!DOCTYPE html><html></html>"),
        answer(b"<html>", Content_Length=""),
    ],
)
async def test_a_web_page_is_not_an_adapter(downloads: AdapterDownloads, tmp_path: Path, reply: bytes) -> None:
    async with serving() as host:
        host.on("/page", reply)
        error = await refused(downloads, host.url("/page"))
    assert isinstance(error, LoraInvalid)
    assert "HTML page" in error.message
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("401 Unauthorized", LoraForbidden),
        ("403 Forbidden", LoraForbidden),
        ("404 Not Found", LoraNotFound),
        ("410 Gone", LoraNotFound),
        ("500 Internal Server Error", LoraDownloadFailed),
        ("206 Partial Content", LoraDownloadFailed),
        ("304 Not Modified", LoraDownloadFailed),
    ],
)
async def test_these_statuses_are_errors_of_their_own_and_not_tried_again(
    downloads: AdapterDownloads, status: str, kind: type[ChromaError]
) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", status))
        error = await refused(downloads, host.url("/a"))
    assert type(error) is kind
    assert status[:3] in error.message
    assert len(host.seen) == 1


@pytest.mark.parametrize("status", ["429 Too Many", "502 Bad", "503 Busy", "504 Late"])
async def test_a_busy_host_is_asked_again(downloads: AdapterDownloads, status: str) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", status, Retry_After="0"), answer(b"", status), answer())
        await fetch(downloads, host.url("/a"))
    assert len(host.seen) == 3


async def test_a_host_that_stays_busy_is_given_up_after_three_tries(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", "503 Busy"))
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraDownloadFailed)
    assert len(host.seen) == 3


@pytest.mark.parametrize("moment", ["3600", "Fri, 01 Jan 2100 00:00:00 GMT"])
async def test_a_long_pause_is_passed_on_and_not_waited_for(downloads: AdapterDownloads, moment: str) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", "429 Too Many", Retry_After=moment))
        error = await refused(downloads, host.url("/a"))
    assert len(host.seen) == 1
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 3600


@pytest.mark.parametrize("moment", ["0", "soon", "-5", "Fri, 01 Jan 2010 00:00:00 GMT"])
async def test_odd_pauses_do_not_hinder_the_next_try(downloads: AdapterDownloads, moment: str) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", "503 Busy", Retry_After=moment), answer())
        await fetch(downloads, host.url("/a"))


async def test_no_connection_is_a_failed_download(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        pass
    assert isinstance(await refused(downloads, host.url("/a")), LoraDownloadFailed)


async def stay_silent(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"x", Content_Length="90000"))
    await writer.drain()
    await asyncio.sleep(3)


async def test_a_slow_body_ends_with_the_deadline(tmp_path: Path) -> None:
    downloads = make(tmp_path, DownloadLimits(total_s=0.2))
    async with serving() as host:
        host.on("/a", trickle)
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraDownloadFailed)
    assert "longer than 0.2 s" in error.message
    assert not files(tmp_path)


async def test_silence_ends_a_try(tmp_path: Path) -> None:
    downloads = make(tmp_path, DownloadLimits(read_s=0.1, backoff_s=0.001))
    async with serving() as host:
        host.on("/a", stay_silent, answer())
        await fetch(downloads, host.url("/a"))
    assert len(host.seen) == 2


@pytest.mark.parametrize(
    "cut",
    [
        answer(BODY, Content_Length=str(len(BODY) + 1)),
        answer(b"5\r\nabc", Content_Length="", Transfer_Encoding="chunked"),
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
async def test_a_cut_answer_is_tried_again_then_an_error(
    downloads: AdapterDownloads, tmp_path: Path, cut: bytes
) -> None:
    async with serving() as host:
        host.on("/a", cut)
        assert isinstance(await refused(downloads, host.url("/a")), LoraDownloadFailed)
        assert len(host.seen) == 3
        assert not files(tmp_path)
        host.on("/a", cut, answer())
        await fetch(downloads, host.url("/a"))


async def send_more_later(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(BODY))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.write(b"x")


@pytest.mark.parametrize("reply", [answer(BODY, Content_Length=str(len(BODY) - 1)), send_more_later])
async def test_more_than_was_announced_is_an_error(
    downloads: AdapterDownloads, tmp_path: Path, reply: bytes | Writes
) -> None:
    async with serving() as host:
        host.on("/a", reply)
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraDownloadFailed)
    assert "more than the length" in error.message
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "reply",
    [
        answer(BODY, Content_Length=""),
        answer(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked"),
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answer(BODY),
        answer(BODY).replace(b"\r\n", b"\n", 4),
    ],
)
async def test_these_answers_are_whole(downloads: AdapterDownloads, reply: bytes) -> None:
    async with serving() as host:
        host.on("/a", reply)
        file = await fetch(downloads, host.url("/a"))
    assert file.path.read_bytes() == (b"abcde" if b"chunked" in reply else BODY)


async def flood(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"", Content_Length="", Transfer_Encoding="chunked"))
    while True:
        writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize("reply", [flood, answer(b"", Content_Length="100001")])
async def test_the_size_limit_holds_announced_or_not(
    downloads: AdapterDownloads, tmp_path: Path, reply: bytes | Writes
) -> None:
    async with serving() as host:
        host.on("/a", reply)
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, InvalidParameter)
    assert "100000 bytes" in error.message
    assert not files(tmp_path)


async def test_an_empty_file_is_refused(downloads: AdapterDownloads, tmp_path: Path) -> None:
    async with serving() as host:
        host.on("/a", answer(b""))
        assert isinstance(await refused(downloads, host.url("/a")), LoraInvalid)
    assert not files(tmp_path)


async def test_a_full_disk_is_told_and_leaves_nothing(
    downloads: AdapterDownloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_part: object, _block: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(PartFile, "write", no_room)
    async with serving() as host:
        host.on("/a", answer())
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, DiskFull)
    assert error.message.startswith("the server's disk has no room for this adapter: ")
    assert error.retry_after_s
    assert not files(tmp_path)


async def test_an_encoded_answer_is_refused(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer(Content_Encoding="gzip"))
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraInvalid)
    assert "encoded" in error.message
