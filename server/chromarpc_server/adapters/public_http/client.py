"""GET requests for URLs that clients send: they reach public addresses, and nothing else.

A name is resolved once, every address of it is checked (`addresses.is_public`), and the connection goes to an
address that was checked (`connections.PinnedBackend`), so that a name that resolves differently later gains
nothing. Redirects are followed here, each under the rules of the first URL.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import httpcore2
import httpx2

from chromarpc_server.adapters.public_http.addresses import IPAddress, Resolve, is_public, resolve
from chromarpc_server.adapters.public_http.connections import CheckedStream, PinnedBackend
from chromarpc_server.domain.errors import InvalidParameter, LoraDownloadFailed

# At DEBUG it writes every header of an answer, signed redirects among them.
logging.getLogger("httpcore2").setLevel(logging.INFO)

MAX_REDIRECTS = 5

_NOT_PUBLIC = (
    "the URL may not be fetched: its host has no public address, or is not one that this server fetches from"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)


class TransientError(Exception):
    """One try of a request failed; another one may succeed.

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
    """A response whose head was read, over a connection to an address that was checked."""

    status: int
    headers: httpx2.Headers
    body: AsyncIterator[bytes]
    stream: CheckedStream


class PublicClient:
    """Sends requests to hosts whose every address is allowed. It knows no proxies, cookies or netrc."""

    def __init__(
        self,
        *,
        connect_s: float,
        read_s: float,
        allowed_hosts: Collection[str] = (),
        resolve: Resolve = resolve,
        is_allowed: Callable[[IPAddress], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Opens no connection.

        Args:
            connect_s: seconds to connect to each address that is tried, and again for TLS.
            read_s: seconds; the longest silence within an answer.
            allowed_hosts: names, or `*.example.org` for every name below one; none allows every public host on
                ports 80 and 443. Redirects obey it too.
            resolve: gives every address of a host.
            is_allowed: the rule that every address must pass.
            ssl_context: trusted certificates; those that the system trusts if None.
        """
        self._connect_s = connect_s
        self._read_s = read_s
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._ssl_context = ssl_context or httpx2.create_ssl_context(trust_env=False)

    def require_allowed(self, url: httpx2.URL) -> None:
        """Checks what can be checked of a URL before its host is resolved: scheme, user, host name and port.

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
            self.require_allowed(url)
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
        """Sends a request over a connection of its own, to an address that was checked.

        Raises:
            InvalidParameter: one of the host's addresses is not allowed, or it has none.
            TransientError: no connection, or it broke, also while the answer is read.
        """
        addresses = await self._checked_addresses(url)
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

    async def _checked_addresses(self, url: httpx2.URL) -> Sequence[IPAddress]:
        """Every address of the URL's host, in the order to try them.

        Raises:
            InvalidParameter: one of them is not allowed, or there is none.
            TransientError: the name service gave no answer.
        """
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS[url.scheme])
        except OSError:
            raise TransientError("the adapter's host cannot be reached") from None
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise InvalidParameter(_NOT_PUBLIC)
        return addresses


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
