"""Where calls come from, as gRPC writes it: `ipv4:192.0.2.1:50234`, `ipv6:%5B2001:db8::1%5D:50234`, `unix:`."""

from __future__ import annotations


def peer_address(peer: str) -> str:
    """The peer without its port, which is another one for each connection. All of a Unix socket are one peer."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return "unix" if kind.startswith("unix") else peer
    return f"{kind}:{rest.rpartition(':')[0]}"
