"""The port that actors connect to: who has no token of ours is not listened to."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chromarpc_server.cluster.certificate import make_server_tls
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.wire import NotOurs

log = logging.getLogger(__name__)

GREETING_S = 10.0
"""For TLS, and again for what an actor says first."""
MAX_STRANGERS = 64
"""Connections of which it is not known yet whose they are."""


@dataclass(frozen=True)
class Greeting:
    """What an actor says of itself."""

    host: str
    pid: int
    versions: Mapping[str, str]


class HostsPort:
    """Lives on the event loop."""

    def __init__(self, on_actor: Callable[[str, Greeting, Link], None]) -> None:
        """`on_actor` is called with each actor that has shown its token, once."""
        self._on_actor = on_actor
        self._tokens: dict[str, str] = {}
        self._strangers = 0
        self._server: asyncio.Server | None = None
        self._trusted = ""

    async def open(self, host: str, port: int) -> None:
        """Listens.

        Raises:
            OSError: the address cannot be bound.
        """
        tls, self._trusted = await asyncio.to_thread(make_server_tls)
        self._server = await asyncio.start_server(
            self._meet, host, port, ssl=tls, ssl_handshake_timeout=GREETING_S
        )

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._server is None:
            raise RuntimeError("the port is not open")
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    @property
    def trusted(self) -> str:
        """The certificate that actors trust, PEM."""
        return self._trusted

    def expect(self, actor: str) -> str:
        """Lets an actor in, once. Returns the token that it must show."""
        self._tokens[actor] = secrets.token_urlsafe(32)
        return self._tokens[actor]

    def forget(self, actor: str) -> None:
        """Lets it in no more."""
        self._tokens.pop(actor, None)

    async def close(self) -> None:
        """Listens no longer."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        if self._strangers >= MAX_STRANGERS:
            link.abort()
            return
        self._strangers += 1
        try:
            said = await asyncio.wait_for(link.greeting(), GREETING_S)
            actor = self._known(said)
            greeting = Greeting(str(said["host"])[:255], int(said["pid"]), _texts(said["versions"]))
        except (EOFError, OSError, NotOurs, LookupError, TypeError, ValueError, ArithmeticError) as error:
            peer = writer.get_extra_info("peername")
            # Not what it said: a token may be in it.
            log.warning("cluster.stranger", extra={"peer": str(peer), "cause": type(error).__name__})
            link.abort()
            return
        finally:
            self._strangers -= 1
        self._on_actor(actor, greeting, link)

    def _known(self, said: Mapping[str, Any]) -> str:
        """Which actor it is that shows this token.

        Raises:
            NotOurs: none that is expected.
        """
        actor, token = str(said.get("actor")), str(said.get("token"))
        expected = self._tokens.get(actor, "")
        if not hmac.compare_digest(expected.encode() or b"\0", token.encode()):
            raise NotOurs("a token that nobody has")
        del self._tokens[actor]
        return actor


def _texts(versions: object) -> dict[str, str]:
    if not isinstance(versions, dict):
        raise NotOurs("not versions")
    return {str(name)[:64]: str(version)[:64] for name, version in list(versions.items())[:64]}
