"""How an actor reaches its server."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Invitation:
    """Ray carries it; nothing of a request is in it."""

    host: str
    port: int
    trusted: str = field(repr=False)
    """The server's certificate, PEM."""
    actor: str
    token: str = field(repr=False)
    """Good for one connection."""
