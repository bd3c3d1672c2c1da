"""How the client connects: channel options, TLS, and when a token may be sent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import grpc

DEFAULT_PORT: Final = 50051
DEFAULT_TARGET: Final = f"127.0.0.1:{DEFAULT_PORT}"
"""Where a server listens unless told otherwise."""
DEFAULT_UNARY_TIMEOUT_S: Final = 10.0
"""Deadline of the short calls (models, info, health) where nobody says."""

CHANNEL_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    # A generation may say nothing for 10 s; without pings a dead connection would look like a slow one for
    # minutes. 20 s is well above the 5 s that the server permits, and above what proxies commonly do.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Images come in parts of 128 KiB, never of more than 1 MiB; previews whole.
    ("grpc.max_receive_message_length", 16 * 2**20),
    # Error details are at most 4 KiB; the default bound of 8 KiB leaves a proxy's own headers little room.
    ("grpc.max_metadata_size", 32 * 2**10),
)


@dataclass(frozen=True)
class TlsOptions:
    """Files (PEM) of a TLS connection; all left out checks the server against well-known authorities."""

    root_certificates: str | os.PathLike[str] | None = None
    """Authorities to trust instead."""
    certificate: str | os.PathLike[str] | None = None
    """This client's certificate chain, for servers that want one; needs `private_key`."""
    private_key: str | os.PathLike[str] | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate where the target's differs."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            OSError: a file cannot be read.
            ValueError: only one of certificate and key is given.
        """
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("a client certificate and its private key come together")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.root_certificates),
            private_key=_read(self.private_key),
            certificate_chain=_read(self.certificate),
        )


@dataclass(frozen=True, repr=False)
class Connection:
    """Everything a channel is made from; its repr shows no secret."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, int | str], ...]
    metadata: tuple[tuple[str, str], ...]
    """Sent with every call."""

    def __repr__(self) -> str:
        return f"Connection({self.target!r}, tls={self.credentials is not None})"


def connection(
    target: str, *, token: str | None, tls: TlsOptions | bool, allow_insecure_token: bool
) -> Connection:
    """Checks what the client was given.

    Raises:
        ValueError: a token without TLS to a host that is not this one; a token no header can hold; an IPv6 address
            that could mean two things.
        OSError: a TLS file cannot be read.
    """
    target = grpc_target(target)
    options = TlsOptions() if tls is True else tls
    credentials = options.credentials() if isinstance(options, TlsOptions) else None
    metadata: tuple[tuple[str, str], ...] = ()
    if token is not None:
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError("the token is empty or holds characters that no header can carry")
        if credentials is None and not is_loopback(target) and not allow_insecure_token:
            raise ValueError(
                f"the token would travel to {target} in plain text: use TLS, or allow_insecure_token=True"
            )
        metadata = (("authorization", f"Bearer {token}"),)
    channel_options = CHANNEL_OPTIONS
    if isinstance(options, TlsOptions) and options.server_name is not None:
        channel_options += (("grpc.ssl_target_name_override", options.server_name),)
    return Connection(target, credentials, channel_options, metadata)


def grpc_target(target: str) -> str:
    """A target as gRPC takes it: IPv6 addresses get their brackets, and the usual port where they have none.

    All else stays: `host:port`, `unix:/path`, `unix-abstract:name`, gRPC's own `dns:///…`.

    Raises:
        ValueError: an IPv6 address without brackets whose end may be a port.
    """
    if target.startswith("[") and target.endswith("]") and _is_ipv6(target[1:-1]):
        return f"{target}:{DEFAULT_PORT}"
    host, _, port = target.rpartition(":")
    has_port = _is_ipv6(host) and port.isdecimal()
    if _is_ipv6(target):
        if has_port:
            raise ValueError(f"{target}: write [{host}]:{port} or [{target}]:{DEFAULT_PORT}")
        return f"[{target}]:{DEFAULT_PORT}"
    return f"[{host}]:{port}" if has_port else target


def is_loopback(target: str) -> bool:
    """Whether a gRPC target is certainly this machine: a Unix socket, `localhost` or a loopback address."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme in ("unix", "unix-abstract"):
        return True
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.removeprefix("///")
    host = target.rpartition(":")[0] if target.count(":") == 1 or "]:" in target else target
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
