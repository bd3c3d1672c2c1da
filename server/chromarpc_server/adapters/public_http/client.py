"""GET requests for URLs that clients send: they reach public addresses, and nothing else.

Names are resolved once, every address is judged, and the connection goes to an address that was judged: a
name that answers differently the next time gains nothing. Redirects are followed here, each under the rules
of the first URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpcore2
import httpx2

from chromarpc_server.domain.errors import InvalidParameter, LoraDownloadFailed

# At DEBUG it writes every header of an answer, signed redirects among them.
logging.getLogger("httpcore2").setLevel(logging.INFO)

IPAddress = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[IPAddress]]]
"""Gives every address of a host, in the order to try them."""

MAX_REDIRECTS = 5

MAX_ADDRESSES = 4
"""How many addresses of one name are tried; the time limit holds for each."""
CLOSE_GRACE_S = 0.5
"""How long a server that was asked to close may take before its silence counts as the end of the answer."""

_NOT_PUBLIC = (
    "the URL may not be fetched: its host has no public address, or is not one that this server fetches from"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)

_NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; a cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's platform service, on an address that looks public
        "169.254.0.0/16",  # link-local; cloud metadata at 169.254.169.254
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "3fff::/20",
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP_MARKS = (0x0000_5EFE, 0x0200_5EFE)
"""Bits 32 to 63 of an IPv6 address that carries an IPv4 address of a private network (RFC 5214)."""


def is_public(address: IPAddress) -> bool:
    """Whether `address` is on the public internet, after the IANA special-purpose address registries.

    IPv6 addresses that carry an IPv4 address (mapped, 6to4, NAT64) are judged by it.
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    carried = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        carried = IPv4Address(int(address) & 0xFFFF_FFFF)
    if carried is not None:
        return is_public(carried)
    return (
        address.scope_id is None
        and address in _GLOBAL_UNICAST_V6
        and not any(address in network for network in _NOT_PUBLIC_V6)
        and (int(address) >> 32) & 0xFFFF_FFFF not in _ISATAP_MARKS
    )


async def resolve(host: str, port: int) -> Sequence[IPAddress]:
    """Every address of `host`, in the order to try them; none where there is no such name.

    Raises:
        OSError: the name service gave no answer.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        return ()
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise
        return ()
    return tuple(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in found))


class CheckedStream(httpcore2.AsyncNetworkStream):
    """A connection that hands over an answer's head line by line, so that its body can be counted exactly.

    The HTTP parser drops what a server sends beyond the length it announced; here nothing of the body has
    been handed over when the head is complete, and what is left at the end can be seen.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._unread = b""
        self._in_head = True
        self._body_left: int | None = None

    def begin_body(self, length_bytes: int | None) -> None:
        """To call once the head is parsed; `length_bytes` as the head announces it, if it does."""
        self._in_head = False
        self._body_left = length_bytes

    async def has_more(self) -> bool:
        """Whether the server sent more than it announced."""
        try:
            return bool(self._unread or await self._inner.read(1, timeout=CLOSE_GRACE_S))
        except (httpcore2.NetworkError, httpcore2.TimeoutException):
            return False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore2's
        """At most `max_bytes`: a line of the head, or what comes of the body and belongs to it."""
        if self._body_left is not None:
            max_bytes = max(1, min(max_bytes, self._body_left))
        data = self._unread or await self._inner.read(max_bytes, timeout=timeout)
        end = min(len(data), max_bytes)
        if self._in_head:
            end = min(end, data.find(b"\n") + 1 or end)
        data, self._unread = data[:end], data[end:]
        if self._body_left is not None:
            self._body_left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore2's
        """Sends all of `buffer`."""
        await self._inner.write(buffer, timeout=timeout)

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        """From here on encrypted; the certificate must be valid for `server_hostname`."""
        self._inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        return self

    def get_extra_info(self, info: str) -> object:
        """What the connection below knows."""
        return self._inner.get_extra_info(info)


class PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the given addresses whatever the name, the first that answers; for one request."""

    def __init__(self, addresses: Sequence[IPAddress]) -> None:
        self._addresses = addresses[:MAX_ADDRESSES]
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - what was resolved is what counts
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first address that answers within `timeout` seconds.

        Raises:
            httpcore2.ConnectError, httpcore2.ConnectTimeout: as the last address tried.
        """
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            try:
                inner = await self._inner.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return CheckedStream(inner)
        raise failure


class TransientError(Exception):
    """A try failed; the next may not.

    Attributes:
        message: for the client.
        retry_after_s: the pause that the host asks for.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Answer:
    """A response whose head was read, over a connection to an address that was judged."""

    status: int
    headers: httpx2.Headers
    body: AsyncIterator[bytes]
    stream: CheckedStream


class PublicClient:
    """Sends requests to hosts whose every address passes a rule. It knows no proxies, cookies or netrc."""

    def __init__(
        self,
        *,
        connect_s: float,
        read_s: float,
        allowed_hosts: Collection[str],
        resolve: Resolve,
        is_allowed: Callable[[IPAddress], bool],
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        """`connect_s`: for each address tried, and again for TLS; `read_s`: the longest silence."""
        self._connect_s = connect_s
        self._read_s = read_s
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._ssl_context = ssl_context or httpx2.create_ssl_context(trust_env=False)

    def check(self, url: httpx2.URL) -> None:
        """Judges what can be judged of a URL before its host is resolved.

        Raises:
            InvalidParameter: it may not be fetched.
        """
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidParameter("only http and https URLs are fetched")
        if url.userinfo:
            raise InvalidParameter("the URL may not hold a user name or password")
        if self._allowed_hosts:
            labels = url.host.split(".")
            patterns = ["*." + ".".join(labels[start:]) for start in range(1, len(labels))]
            if self._allowed_hosts.isdisjoint([url.host, *patterns]):
                raise InvalidParameter(_NOT_PUBLIC)
        elif url.port not in (None, 80, 443):
            raise InvalidParameter("only ports 80 and 443 are fetched from")
        if url.port is not None and not 0 < url.port < 1 << 16:
            raise InvalidParameter("the URL's port does not exist")

    @contextlib.asynccontextmanager
    async def get(
        self, url: httpx2.URL, headers: Mapping[str, str], secret_headers: Mapping[str, str]
    ) -> AsyncIterator[Answer]:
        """The answer of the host that `url` and its redirects lead to, while the context lasts.

        `secret_headers` are sent no more once a redirect has left the scheme, host and port of `url`.

        Raises:
            InvalidParameter: a URL may not be fetched.
            LoraDownloadFailed: there is no end of redirects, or one leads nowhere.
            TransientError: no connection, or it broke, also while the answer is read.
        """
        for _ in range(MAX_REDIRECTS + 1):
            self.check(url)
            async with self._open(url, {**headers, **secret_headers}) as answer:
                if answer.status not in _REDIRECTS:
                    yield answer
                    return
                target = _redirect_target(url, answer.headers.get("location", ""))
            if (target.scheme, target.host, target.port) != (url.scheme, url.host, url.port):
                secret_headers = {}
            url = target
        raise LoraDownloadFailed(f"the adapter's host redirects more than {MAX_REDIRECTS} times")

    @contextlib.asynccontextmanager
    async def _open(self, url: httpx2.URL, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Sends a request over a connection of its own, to an address that passed the rule.

        Raises:
            InvalidParameter: one of the host's addresses does not pass, or it has none.
            TransientError: no connection, or it broke, also while the answer is read.
        """
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS[url.scheme])
        except OSError:
            raise TransientError("the adapter's host cannot be reached") from None
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise InvalidParameter(_NOT_PUBLIC)
        sent = [(b"Host", url.netloc), (b"Connection", b"close"), *httpx2.Headers(headers).raw]
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        timeouts = {"connect": self._connect_s, "read": self._read_s, "write": self._read_s}
        backend = PinnedBackend(addresses)
        try:
            async with (
                httpcore2.AsyncConnectionPool(self._ssl_context, network_backend=backend) as pool,
                pool.stream("GET", target, headers=sent, extensions={"timeout": timeouts}) as response,
            ):
                stream: CheckedStream = response.extensions["network_stream"]
                received = httpx2.Headers(response.headers)
                yield Answer(response.status, received, response.aiter_stream(), stream)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
            raise TransientError("the adapter's host cannot be reached") from None
        except httpcore2.TimeoutException:
            raise TransientError(f"the adapter's host was silent for {self._read_s:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError):
            raise TransientError(
                "the adapter's host broke off, or answers with something else than HTTP"
            ) from None


def _redirect_target(url: httpx2.URL, location: str) -> httpx2.URL:
    """Where a redirect of `url` leads.

    Raises:
        InvalidParameter: from https to http.
        LoraDownloadFailed: nowhere.
    """
    try:
        target = url.join(location).copy_with(fragment=None)
        target = target.copy_with(host=target.host.removesuffix("."))
    except (httpx2.InvalidURL, ValueError):
        location = ""
    if not location:
        raise LoraDownloadFailed("the adapter's host redirects to nowhere")
    if url.scheme == "https" and target.scheme == "http":
        raise InvalidParameter("the URL redirects from https to http, which is not followed")
    return target
