"""Files that were downloaded: shared between calls, used again, and evicted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from chromarpc_server.adapters.downloads.cache import Downloaded
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.errors import DiskFull, LoraNotFound
from chromarpc_server.domain.limits import DownloadLimits
from tests.adapters.file_hosts import BODY, FIELD, TOKEN, answer, fetch, files, make, serving, trickle
from tests.adapters.libraries import flip_a_bit


async def test_calls_for_the_same_url_and_token_share_one_download(tmp_path: Path) -> None:
    downloads = make(tmp_path, DownloadLimits())
    go = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(answer())

    async with serving() as host:
        host.on("/a", wait)
        calls = [asyncio.create_task(fetch(downloads, host.url("/a"))) for _ in range(5)]
        other = asyncio.create_task(fetch(downloads, host.url("/a"), TOKEN))
        async with asyncio.timeout(10):
            await host.asked.acquire()
            await host.asked.acquire()
        calls[0].cancel()
        go.set()
        results = await asyncio.gather(*calls[1:], other)
    assert len(host.seen) == 2
    assert len({file.path for file in results}) == 1
    assert calls[0].cancelled()


async def test_calls_that_share_an_error_each_blame_their_own_field(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer(b"", "404 Not Found"))
        calls = [fetch(downloads, host.url("/a"), name=f"loras.{i}.path") for i in range(3)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert len(host.seen) == 1
    blamed = [[v.field for v in error.violations] for error in errors if isinstance(error, LoraNotFound)]
    assert blamed == [["loras.0.path"], ["loras.1.path"], ["loras.2.path"]]


async def test_cancelling_the_last_call_ends_the_download_and_leaves_nothing(
    downloads: AdapterDownloads, tmp_path: Path
) -> None:
    ended = asyncio.Event()

    async def until_cut(writer: asyncio.StreamWriter) -> None:
        try:
            await trickle(writer)
        finally:
            ended.set()

    async with serving() as host:
        host.on("/a", until_cut, answer())
        begun = asyncio.Event()

        async def begin() -> None:
            await downloads.fetch(host.url("/a"), token=None, field=FIELD, progress=lambda *_: begun.set())

        calls = [asyncio.create_task(begin()) for _ in range(2)]
        await begun.wait()
        calls[0].cancel()
        await asyncio.wait(calls, timeout=0.05)
        assert len(files(tmp_path)) == 1
        calls[1].cancel()
        await asyncio.wait(calls)
        assert not files(tmp_path)
        await asyncio.wait_for(ended.wait(), 2)
        await fetch(downloads, host.url("/a"))


async def test_an_entity_tag_saves_the_second_download(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on(
            "/a", answer(ETag='"v1"'), answer(b"", "304 Not Modified", ETag='"v1"'), answer(b"new", ETag='"v2"')
        )
        first = await fetch(downloads, host.url("/a"))
        again = await fetch(downloads, host.url("/a"))
        assert (again.path, again.sha256) == (first.path, first.sha256)
        assert host.seen[1].headers["if-none-match"] == '"v1"'
        assert (await fetch(downloads, host.url("/a"))).path.read_bytes() == b"new"


async def test_without_a_strong_entity_tag_or_the_file_it_is_downloaded_anew(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer(ETag='W/"v1"'), answer(), answer(ETag='"v3"'), answer())
        for _ in range(3):
            file = await fetch(downloads, host.url("/a"))
        file.path.unlink()
        assert (await fetch(downloads, host.url("/a"))).path.read_bytes() == BODY
    assert all("if-none-match" not in request.headers for request in host.seen)


async def test_the_same_bytes_keep_their_place_and_age(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer())
        before = await fetch(downloads, host.url("/a"))
        os.utime(before.path, ns=(1, 10**18))
        after = await fetch(downloads, host.url("/a"))
    assert (after.path, after.path.stat().st_mtime_ns) == (before.path, 10**18)


async def test_a_damaged_file_is_fetched_again_although_its_host_says_it_is_the_same(
    downloads: AdapterDownloads,
) -> None:
    async with serving() as host:
        host.on("/a", answer(ETag='"v1"'), answer(ETag='"v1"'))
        damaged = await fetch(downloads, host.url("/a"))
        flip_a_bit(damaged.path)
        assert (await fetch(downloads, host.url("/a"))).path.read_bytes() == BODY
    assert all("if-none-match" not in request.headers for request in host.seen)


async def test_a_download_that_would_use_up_the_reserve_is_not_begun(tmp_path: Path) -> None:
    free = DiskRoom(tmp_path, 0).free_bytes()
    downloads = make(tmp_path, room=DiskRoom(tmp_path, free + 2**40))
    async with serving() as host:
        host.on("/a", answer())
        with pytest.raises(DiskFull, match="keeps in reserve") as caught:
            await fetch(downloads, host.url("/a"))
    assert caught.value.retry_after_s
    assert not files(tmp_path)


async def test_the_files_used_longest_ago_leave_first_but_none_in_use(tmp_path: Path) -> None:
    downloads = make(tmp_path, DownloadLimits(cache_bytes=25))
    async with serving() as host:

        async def get(name: str) -> Downloaded:
            host.on(f"/{name}", answer(name.encode() * 10))
            return await fetch(downloads, host.url(f"/{name}"))

        a, b = await get("a"), await get("b")
        b.release()
        c = await get("c")
        assert files(tmp_path) == {a.path.name, c.path.name}
        with c:
            pass
        c.release()
        a.release()
        os.utime(a.path, ns=(1, a.path.stat().st_mtime_ns))
        (await get("a")).release()
        d = await get("d")
        assert files(tmp_path) == {a.path.name, d.path.name}
        e, f = await get("e"), await get("f")
        assert files(tmp_path) == {d.path.name, e.path.name, f.path.name}


async def test_a_file_larger_than_the_cache_stays_while_it_is_in_use(tmp_path: Path) -> None:
    downloads = make(tmp_path, DownloadLimits(cache_bytes=5))
    async with serving() as host:
        host.on("/a", answer(b"0123456789"))
        host.on("/b", answer(b"abc"))
        with await fetch(downloads, host.url("/a")) as file:
            assert file.path.exists()
        await fetch(downloads, host.url("/b"))
        assert not file.path.exists()


def test_what_a_crash_left_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tmpabc.part").write_bytes(b"half")
    (tmp_path / "kept.safetensors").write_bytes(b"whole")
    make(tmp_path)
    assert files(tmp_path) == {"kept.safetensors"}


async def test_a_file_of_unknown_length_leaves_the_reserve_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, free = DiskRoom(tmp_path, 1000), iter([1000 + 3, 1000 + 3])
    monkeypatch.setattr(room, "free_bytes", lambda: next(free))
    downloads = make(tmp_path, room=room)
    async with serving() as host:
        body = b"4\r\nabcd\r\n0\r\n\r\n"
        host.on("/a", answer(body, Content_Length="", Transfer_Encoding="chunked"))
        with pytest.raises(DiskFull):
            await fetch(downloads, host.url("/a"))
    assert not files(tmp_path)
