"""Adapters by URL: what is fetched, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme

from chromarpc_server.adapters.downloads import fetching as adapter_download
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads, Downloaded, DownloadLimits
from chromarpc_server.adapters.public_http.client import IPAddress, is_public
from chromarpc_server.domain.errors import (
    ChromaError,
    InvalidParameter,
    LoraDownloadFailed,
    LoraForbidden,
    LoraInvalid,
    LoraNotFound,
)

BODY = bytes(range(256)) * 40
TOKEN = "hf_thisIsSecret"
FIELD = "loras.0.path"
LOOPBACK = ip_address("127.0.0.1")
NAMES = ("adapters.example", "cdn.example", "inside.example", "huggingface.co", "*.huggingface.co")
QUICK = DownloadLimits(file_bytes=100_000, cache_bytes=100_000, connect_s=2, read_s=2, total_s=5, backoff_s=0.001)

Writes = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = BODY, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; `headers` with underscores for hyphens, and an empty value for none at all."""
    fields = {"Content_Length": str(len(body)), "Content_Type": "application/octet-stream", **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode() + body


def redirect(location: str) -> bytes:
    return answer(b"", "302 Found", Location=location)


@dataclass
class Seen:
    target: str
    headers: dict[str, str]


@dataclass
class Host:
    """A server on 127.0.0.1 that answers each path with its next answer, the last one for ever."""

    routes: dict[str, list[bytes | Writes]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    asked: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released once for each request."""
    serving: set[asyncio.Task[None]] = field(default_factory=set)
    names: list[str] = field(default_factory=list)
    """Server names that TLS clients asked for."""

    def on(self, path: str, *answers: bytes | Writes) -> None:
        self.routes[path] = list(answers)

    def url(self, path: str, name: str = "adapters.example", scheme: str = "http") -> str:
        return f"{scheme}://{name}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request and closes; ends quietly however the connection does."""
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        with contextlib.suppress(
            ConnectionError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
                lines = (line.partition(": ") for line in head[1:] if line)
                self.seen.append(Seen(head[0].split(" ")[1], {name.lower(): value for name, _, value in lines}))
                answers = self.routes[self.seen[-1].target.partition("?")[0]]
                reply = answers.pop(0) if len(answers) > 1 else answers[0]
                self.asked.release()
                if isinstance(reply, bytes):
                    writer.write(reply)
                    await writer.drain()
                else:
                    await reply(writer)
            finally:
                writer.close()
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    host = Host()
    if ssl_context is not None:
        ssl_context.sni_callback = lambda _socket, name, _context: host.names.append(name or "")
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=ssl_context)
    host.port = server.sockets[0].getsockname()[1]
    async with server:
        yield host
        for task in host.serving:
            task.cancel()
        await asyncio.gather(*host.serving)


async def to_loopback(host: str, port: int) -> Sequence[IPAddress]:
    return (ip_address("10.0.0.7"),) if host == "inside.example" else (LOOPBACK,)


def only_loopback(address: IPAddress) -> bool:
    return address == LOOPBACK


@pytest.fixture
def downloads(tmp_path: Path) -> AdapterDownloads:
    return make(tmp_path)


def make(
    folder: Path, limits: DownloadLimits = QUICK, ssl_context: ssl.SSLContext | None = None
) -> AdapterDownloads:
    return AdapterDownloads(
        folder,
        limits,
        allowed_hosts=NAMES,
        resolve=to_loopback,
        is_allowed=only_loopback,
        ssl_context=ssl_context,
    )


async def fetch(downloads: AdapterDownloads, url: str, token: str | None = None, name: str = FIELD) -> Downloaded:
    return await downloads.fetch(url, token=token, field=name, progress=lambda done, total: None)


async def refused(downloads: AdapterDownloads, url: str, token: str | None = None) -> ChromaError:
    """The error that `url` ends with, after what is true of every error was checked."""
    with pytest.raises(ChromaError) as caught:
        await fetch(downloads, url, token)
    error = caught.value
    assert [violation.field for violation in error.violations] == [FIELD]
    assert TOKEN not in f"{error!r} {error.violations} {error.metadata}"
    assert "127.0.0.1" not in error.message
    return error


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


async def trickle(writer: asyncio.StreamWriter) -> None:
    """A body that never ends, a byte at a time."""
    writer.write(answer(b"", Content_Length="90000"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


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

    monkeypatch.setattr(adapter_download._PartFile, "write", no_room)
    async with serving() as host:
        host.on("/a", answer())
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraDownloadFailed)
    assert error.message == "the server's disk has no room for this adapter"
    assert not files(tmp_path)


async def test_an_encoded_answer_is_refused(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer(Content_Encoding="gzip"))
        error = await refused(downloads, host.url("/a"))
    assert isinstance(error, LoraInvalid)
    assert "encoded" in error.message


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
    public = AdapterDownloads(tmp_path, QUICK, resolve=resolve)
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
    error = await refused(AdapterDownloads(tmp_path, QUICK), f"http://{host}/a.safetensors")
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

    downloads = AdapterDownloads(
        tmp_path, QUICK, allowed_hosts=NAMES, resolve=rebind, is_allowed=lambda address: address == LOOPBACK
    )
    async with serving() as host:
        host.on("/a", answer())
        await fetch(downloads, host.url("/a"))
        assert asked == ["adapters.example"]
        assert isinstance(await refused(downloads, host.url("/a")), InvalidParameter)
    assert len(host.seen) == 1


async def test_the_next_address_is_tried_where_one_is_dead(tmp_path: Path) -> None:
    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        return [ip_address("127.0.0.2"), LOOPBACK]

    downloads = AdapterDownloads(
        tmp_path, QUICK, allowed_hosts=NAMES, resolve=resolve, is_allowed=lambda address: address.is_loopback
    )
    async with serving() as host:
        host.on("/a", answer())
        await fetch(downloads, host.url("/a"))


async def test_a_name_service_that_fails_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[IPAddress]:
        asked.append(host)
        raise OSError("no answer")

    downloads = AdapterDownloads(tmp_path, QUICK, resolve=resolve)
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

    error = await refused(AdapterDownloads(tmp_path, QUICK, resolve=resolve), url)
    assert isinstance(error, InvalidParameter)
    assert "secret" not in error.message


@pytest.mark.parametrize("host", ["other.example", "example", "huggingface.co.evil.example", "evilhuggingface.co"])
async def test_hosts_beyond_the_list_are_refused(downloads: AdapterDownloads, host: str) -> None:
    assert isinstance(await refused(downloads, f"https://{host}/a"), InvalidParameter)


@pytest.mark.parametrize("token", ["", "hf x", "hf\r\nX: y", "hfé", "x" * 513])
async def test_a_token_that_cannot_be_one_is_refused(downloads: AdapterDownloads, token: str) -> None:
    error = await refused(downloads, "https://adapters.example/a", token)
    assert isinstance(error, InvalidParameter)
    assert not token or token not in error.message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key in one file, valid for three of the names; its authority beside it."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("huggingface.co", "other.huggingface.co", "cdn.example")
    issued.private_key_and_cert_chain_pem.write_to_path(file)
    authority.cert_pem.write_to_path(f"{file}.crt")
    return file


@contextlib.asynccontextmanager
async def serving_tls(certificate: Path) -> AsyncIterator[tuple[Host, ssl.SSLContext]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with serving(context) as host:
        yield host, ssl.create_default_context(cafile=f"{certificate}.crt")


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


async def test_the_same_bytes_keep_their_file(downloads: AdapterDownloads) -> None:
    async with serving() as host:
        host.on("/a", answer())
        before = (await fetch(downloads, host.url("/a"))).path.stat()
        after = (await fetch(downloads, host.url("/a"))).path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


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
        shown = repr(downloads) + repr(asyncio.all_tasks()) + repr(downloads.__dict__["_flights"].values())
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
