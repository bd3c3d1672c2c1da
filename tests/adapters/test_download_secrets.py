"""Tokens and signed URLs: who is sent them, and that nobody else sees them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.domain.errors import InvalidParameter, LoraDownloadFailed, LoraForbidden
from tests.adapters.file_hosts import TOKEN, answer, fetch, make, redirect, refused, serving, serving_tls


@pytest.mark.parametrize("token", ["", "hf x", "hf\r\nX: y", "hfé", "x" * 513])
async def test_a_token_that_cannot_be_one_is_refused(downloads: AdapterDownloads, token: str) -> None:
    error = await refused(downloads, "https://adapters.example/a", token)
    assert isinstance(error, InvalidParameter)
    assert not token or token not in error.message


async def test_the_token_goes_to_hugging_face_alone(certificate: Path, tmp_path: Path) -> None:
    async with serving_tls(certificate) as (host, trusted):
        downloads = make(tmp_path, ssl_context=trusted)
        host.on("/o/r/resolve/main/a", redirect("/b"))
        host.on("/b", redirect(host.url("/c?X-Signature=1", "cdn.example", "https")))
        host.on("/c", redirect(host.url("/d", "huggingface.co", "https")))
        host.on("/d", redirect(host.url("/e", "other.huggingface.co", "https")))
        host.on("/e", answer())
        await fetch(downloads, host.url("/o/r/resolve/main/a", "huggingface.co", "https"), TOKEN)
        sent = [request.headers.get("authorization") for request in host.seen]
        assert sent == [f"Bearer {TOKEN}"] * 2 + [None] * 3
        assert host.names == ["huggingface.co"] * 2 + ["cdn.example", "huggingface.co", "other.huggingface.co"]
        host.seen.clear()
        await fetch(downloads, host.url("/e", "cdn.example", "https"), TOKEN)
        await fetch(downloads, host.url("/e", "other.huggingface.co", "https"), TOKEN)
        sent = [request.headers.get("authorization") for request in host.seen]
        assert sent == [None, f"Bearer {TOKEN}"]


async def test_the_token_is_not_sent_without_encryption(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/o/r/resolve/main/a", answer())
        await fetch(downloads, host.url("/o/r/resolve/main/a", "huggingface.co"), TOKEN)
    assert "authorization" not in host.seen[0].headers


async def test_https_does_not_fall_back_to_http(certificate: Path, tmp_path: Path) -> None:
    async with serving_tls(certificate) as (host, trusted):
        host.on("/a", redirect("http://cdn.example/a"))
        url = host.url("/a", "cdn.example", "https")
        error = await refused(make(tmp_path, ssl_context=trusted), url)
    assert isinstance(error, InvalidParameter)
    assert "https to http" in error.message


async def test_a_certificate_must_be_trusted_and_for_the_name(certificate: Path, tmp_path: Path) -> None:
    async with serving_tls(certificate) as (host, trusted):
        host.on("/a", answer())
        wrong_name = host.url("/a", "adapters.example", "https")
        assert isinstance(await refused(make(tmp_path, ssl_context=trusted), wrong_name), LoraDownloadFailed)
        untrusted = host.url("/a", "cdn.example", "https")
        assert isinstance(await refused(make(tmp_path), untrusted), LoraDownloadFailed)
    assert not host.seen


async def test_neither_tokens_nor_queries_are_logged_or_shown(
    certificate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving_tls(certificate) as (host, trusted):
        downloads = make(tmp_path, ssl_context=trusted)
        host.on("/o/r/resolve/main/a", redirect(host.url("/b?signature=querySecret", "cdn.example", "https")))
        host.on("/b", answer(b"", "503 Busy"), answer())
        url = host.url("/o/r/resolve/main/a?key=querySecret", "huggingface.co", "https")
        call = asyncio.create_task(fetch(downloads, url, TOKEN))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        shown = (
            repr(downloads)
            + repr(asyncio.all_tasks())
            + repr(vars(downloads.__dict__["_in_progress"])["_flights"].values())
        )
        file = await call
        host.on("/b", answer(b"", "403 Forbidden"))
        with pytest.raises(LoraForbidden) as caught:
            await fetch(downloads, url, TOKEN)
    events = [record for record in caplog.records if record.name.startswith("chromarpc_server")]
    assert [record.getMessage() for record in events] == ["adapter.download_retried", "adapter.downloaded"]
    shown += f"{file!r} {caught.value!r}" + "".join(str(vars(record)) for record in caplog.records)
    assert TOKEN not in shown
    assert "querySecret" not in shown
    assert file.sha256 in shown
