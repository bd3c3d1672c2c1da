"""Which addresses, hosts and URLs are reached, also by redirects."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.public_http.addresses import IPAddress, is_public, resolve
from chromarpc_server.domain.errors import InvalidParameter, LoraDownloadFailed
from tests.adapters.file_hosts import LOOPBACK, answer, fetch, make, redirect, refused, serving


async def test_redirects_are_followed_five_times_and_no_more(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        for step in range(5):
            host.on(f"/{step}", redirect(f"/{step + 1}?q={step}"))
        host.on("/5", answer())
        await fetch(downloads, host.url("/0"))
        assert host.seen[-1].target == "/5?q=4"
        host.on("/loop", redirect("/loop"))
        error = await refused(downloads, host.url("/loop"))
    assert isinstance(error, LoraDownloadFailed)
    assert "redirects" in error.message


@pytest.mark.parametrize(
    "location",
    [
        "",
        "http://user@adapters.example/",
        "ftp://adapters.example/x",
        "http://adapters.example:0/",
        "http://[bad/",
    ],
)
async def test_a_redirect_obeys_the_same_rules(downloads: AdapterDownloads, location: str) -> None:
    async with serving() as host:
        host.on("/a", redirect(location))
        await refused(downloads, host.url("/a"))
        assert len(host.seen) == 1


async def test_a_refused_address_is_told_in_the_same_words_however_it_is_found(
    downloads: AdapterDownloads, tmp_path: Path
) -> None:
    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        addresses = {"nowhere": [], "mixed": ["93.184.216.34", "10.0.0.1"], "inside": ["fd00::1"]}
        return [ip_address(address) for address in addresses[host.partition(".")[0]]]

    messages = set()
    async with serving() as host:
        host.on("/a", redirect("http://inside.example/"))
        host.on("/b", redirect("http://elsewhere.example/"))
        for path in ("/a", "/b"):
            messages.add((await refused(downloads, host.url(path))).message)
    public = make(tmp_path, allowed_hosts=(), resolve=resolve, is_allowed=is_public)
    for name in ("nowhere", "mixed", "inside"):
        error = await refused(public, f"https://{name}.example/a.safetensors")
        assert isinstance(error, InvalidParameter)
        messages.add(error.message)
    assert len(messages) == 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fd00:ec2::254]",
        "localhost",
        "localhost.",
        "LOCALHOST",
        "0.0.0.0",
        "0",
        "169.254.169.254",
        "２１３０７０６４３３",
        "①②⑦.0.0.1",
    ],
)
async def test_no_spelling_of_an_inner_address_is_reached(tmp_path: Path, host: str) -> None:
    error = await refused(
        make(tmp_path, allowed_hosts=(), resolve=resolve, is_allowed=is_public), f"http://{host}/a.safetensors"
    )
    assert isinstance(error, InvalidParameter)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.255.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.8.8.8",
        "168.63.129.16",
        "169.254.169.254",
        "172.31.0.1",
        "192.0.0.192",
        "192.168.1.1",
        "198.19.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:a00:1::1",
        "2001:0:808:808::1",
        "2001:db8::1",
        "2606:4700::5efe:10.0.0.1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_these_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "100.63.255.255",
        "172.32.0.1",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2001:4860:4860::8888",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_these_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


async def test_a_name_that_changes_its_address_is_connected_to_where_it_was_checked(tmp_path: Path) -> None:
    answers = iter(["127.0.0.1", "10.0.0.1"])
    asked: list[str] = []

    async def rebind(host: str, port: int) -> Sequence[IPAddress]:
        asked.append(host)
        return [ip_address(next(answers))]

    downloads = make(tmp_path, resolve=rebind, is_allowed=lambda address: address == LOOPBACK)
    async with serving() as host:
        host.on("/a", answer())
        await fetch(downloads, host.url("/a"))
        assert asked == ["adapters.example"]
        assert isinstance(await refused(downloads, host.url("/a")), InvalidParameter)
    assert len(host.seen) == 1


async def test_the_next_address_is_tried_where_one_is_dead(tmp_path: Path) -> None:
    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        return [ip_address("127.0.0.2"), LOOPBACK]

    downloads = make(tmp_path, resolve=resolve, is_allowed=lambda address: address.is_loopback)
    async with serving() as host:
        host.on("/a", answer())
        await fetch(downloads, host.url("/a"))


async def test_a_name_service_that_fails_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        asked.append(host)
        raise OSError("no answer")

    downloads = make(tmp_path, allowed_hosts=(), resolve=resolve, is_allowed=is_public)
    assert isinstance(await refused(downloads, "https://a.example/a"), LoraDownloadFailed)
    assert len(asked) == 3


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@example.com/a",
        "https://user@example.com/a",
        "http://adapters.example\\@127.0.0.1/a",
        "ftp://example.com/a",
        "file:///etc/passwd",
        "data:,x",
        "https:///a",
        "example.com/a",
        "//example.com/a",
        "",
        "http://[::1/a",
        "https://example.com/\x00",
        "https://example.com:8443/a",
        "http://example.com:22/a",
        "http://example.com:0/a",
        "http://example.com:99999/a",
    ],
)
async def test_these_urls_are_refused_unresolved(tmp_path: Path, url: str) -> None:
    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        raise AssertionError(host)

    error = await refused(make(tmp_path, allowed_hosts=(), resolve=resolve, is_allowed=is_public), url)
    assert isinstance(error, InvalidParameter)
    assert "secret" not in error.message


@pytest.mark.parametrize("host", ["other.example", "example", "huggingface.co.evil.example", "evilhuggingface.co"])
async def test_hosts_beyond_the_list_are_refused(downloads: AdapterDownloads, host: str) -> None:
    assert isinstance(await refused(downloads, f"https://{host}/a"), InvalidParameter)
