"""Addresses to listen on: IPv4, IPv6 and Unix sockets, as people write them and as they can be pasted again.

Knows the standard library only.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

UNIX = "unix:"
ABSTRACT = "unix-abstract:"
"""A Unix socket without a file; Linux only."""
MAX_PATH_BYTES = 107
"""What a system's address of a Unix socket holds."""
CONNECT_S = 1.0
"""How long a socket that is there already has to answer, where it is busy."""


def parse_host(text: str) -> str:
    """What `--host` says, in one spelling: `::1` for `[::1]`, `unix:/run/x.sock` for `unix:///run/x.sock`.

    Raises:
        ValueError: it is no address to listen on.
    """
    if text.startswith(ABSTRACT):
        if text == ABSTRACT:
            raise ValueError(f"{text}: a name follows, as in {ABSTRACT}chromarpc")
        return text
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if path.startswith("//"):
            path = path.removeprefix("//")
            if not path.startswith("/"):
                raise ValueError(
                    f"{text}: unix:// is followed by an absolute path, as in unix:///run/chromarpc.sock"
                )
        if not path or path.endswith("/"):
            raise ValueError(f"{text}: a path follows, as in unix:/run/chromarpc.sock")
        absolute = Path(path).absolute()
        if len(os.fsencode(absolute)) > MAX_PATH_BYTES:
            raise ValueError(f"{text}: the path of a Unix socket has at most {MAX_PATH_BYTES} bytes")
        return f"{UNIX}{absolute}"
    if text.startswith("[") or text.endswith("]"):
        inner = text.removeprefix("[").removesuffix("]")
        if text != f"[{inner}]" or not _is_ipv6(inner):
            raise ValueError(f"{text}: brackets hold an IPv6 address, as in [::1]")
        return inner
    if ":" in text and not _is_ipv6(text):
        raise ValueError(f"{text}: an address without a port, such as 127.0.0.1, ::1 or unix:/run/chromarpc.sock")
    return text


def parse_tcp_host(text: str) -> str:
    """The same where a Unix socket is of no use.

    Raises:
        ValueError: it is no address to listen on, or a Unix socket.
    """
    if is_unix(text):
        raise ValueError(f"{text}: only gRPC is served on a Unix socket (--host); give an IP address")
    return parse_host(text)


def is_unix(host: str) -> bool:
    """Whether a host is a Unix socket, with a file or without."""
    return host.startswith((UNIX, ABSTRACT))


def is_local(host: str) -> bool:
    """Whether what listens there can be reached from this machine alone."""
    try:
        return host == "localhost" or is_unix(host) or ip_address(host).is_loopback
    except ValueError:
        return False


def joined(host: str, port: int) -> str:
    """Host and port as one address, which clients take as it is: `[::1]:50051`; a Unix socket has no port."""
    if is_unix(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def room_for(address: str) -> Iterator[None]:
    """Inside, a Unix socket may be made at an address; others are left alone.

    What a killed server left there is removed, and what somebody listens on is not, nor anything else. The file
    that is made is for this user alone (mode 0600).

    Raises:
        OSError: somebody listens there, or something else is there.
    """
    path = address.removeprefix(UNIX)
    if path == address:
        yield
        return
    _remove_left_over(Path(path), address)
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _remove_left_over(path: Path, address: str) -> None:
    if not path.parent.is_dir():
        raise OSError(f"cannot listen on {address}: {path.parent} is not a folder")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise OSError(f"cannot listen on {address}: a file is there that is no socket; it is left as it is")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # nobody listens: a server that was killed left it
        except OSError as error:
            reason = "another server is busy there" if isinstance(error, TimeoutError) else error.strerror
            raise OSError(f"cannot listen on {address}: {reason}") from None
        else:
            raise OSError(f"cannot listen on {address}: another server listens there")


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False
