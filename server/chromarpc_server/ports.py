"""Whether ports are free, asked before anything slow is begun."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass

WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class WantedPort:
    """A port that will be bound, and the setting that names it."""

    flag: str
    host: str
    port: int
    """0 picks a free one."""


class PortUnusable(OSError):
    """A port cannot be bound; the message names its setting."""


def require_free(wanted: Sequence[WantedPort]) -> None:
    """Looks at each port without keeping it.

    Raises:
        PortUnusable: somebody listens there, or at one of the addresses that the host name stands for; the address
            is not this machine's; or two settings name the same port.
    """
    fixed = [port for port in wanted if port.port and not port.host.startswith(("unix:", "unix-abstract:"))]
    for index, port in enumerate(fixed):
        for other in fixed[:index]:
            if port.port == other.port and (port.host == other.host or WILDCARDS & {port.host, other.host}):
                raise PortUnusable(f"{port.flag} {port.port} is the port of {other.flag} too")
    for port in fixed:
        _require(port)


def _require(port: WantedPort) -> None:
    host = port.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise PortUnusable(f"{port.flag} {port.port}: there is no host {host}: {error.strerror}") from None
    problems: list[OSError] = []
    for family, kind, protocol, _, address in found:
        problem = _problem(family, kind, protocol, address)
        # A name of several addresses is bound where it can be; half of it must not be somebody else's.
        if problem is not None and (problem.errno == errno.EADDRINUSE or len(found) == 1):
            raise _unusable(port, str(address[0]), problem)
        if problem is not None:
            problems.append(problem)
    if problems and len(problems) == len(found):
        raise _unusable(port, host, problems[0])


def _problem(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> OSError | None:
    try:
        with socket.socket(family, kind, protocol) as probe:
            # Connections that are only just closed are no hindrance; those who listen are.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _unusable(port: WantedPort, host: str, problem: OSError) -> PortUnusable:
    at = f"[{host}]:{port.port}" if ":" in host else f"{host}:{port.port}"
    reason = problem.strerror or str(problem)
    advice = "; another process listens there" if problem.errno == errno.EADDRINUSE else ""
    return PortUnusable(f"{port.flag} {port.port}: {at}: {reason}{advice}")
