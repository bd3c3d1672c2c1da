"""Hosts on loopback that serve files, and downloads that may reach them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.downloads.cache import DownloadCache, Downloaded
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.public_http.addresses import IPAddress, Resolve
from chromarpc_server.adapters.public_http.client import PublicClient
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.limits import DownloadLimits

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


def make(
    folder: Path,
    limits: DownloadLimits = QUICK,
    ssl_context: ssl.SSLContext | None = None,
    *,
    allowed_hosts: Collection[str] = NAMES,
    resolve: Resolve = to_loopback,
    is_allowed: Callable[[IPAddress], bool] = only_loopback,
    room: DiskRoom | None = None,
) -> AdapterDownloads:
    client = PublicClient(
        connect_s=limits.connect_s,
        read_s=limits.read_s,
        allowed_hosts=allowed_hosts,
        resolve=resolve,
        is_allowed=is_allowed,
        ssl_context=ssl_context,
    )
    store = ContentStore(folder, LoraSource.DOWNLOAD)
    return AdapterDownloads(DownloadCache(store, limits.cache_bytes, room), client, limits)


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
    """What lies in a folder of downloads, unfinished ones too, but for the notes of owners."""
    whole = {path.name for path in folder.glob("*.*") if path.suffix != ".json"}
    return whole | {path.name for path in folder.glob("unfinished/*/*") if path.name != "lock"}


async def trickle(writer: asyncio.StreamWriter) -> None:
    """A body that never ends, a byte at a time."""
    writer.write(answer(b"", Content_Length="90000"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving_tls(certificate: Path) -> AsyncIterator[tuple[Host, ssl.SSLContext]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with serving(context) as host:
        yield host, ssl.create_default_context(cafile=f"{certificate}.crt")
