"""Addresses as people write them are taken or refused by name; what is there already is left alone."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from chromarpc.channel import connection
from chromarpc_server.settings import ServerSettings
from chromarpc_server.web import WebSettings


def refusal(kind: type[ServerSettings], *flags: str) -> str:
    """Why flags are refused; empty where they are taken."""
    try:
        CliApp.run(kind, cli_args=list(flags))
    except ValidationError as error:
        return "; ".join(problem["msg"] for problem in error.errors())
    return ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--host", "127.0.0.1"), ""),
        (("--host", "localhost"), ""),
        (("--host", "::1"), ""),
        (("--host", "[::1]"), ""),
        (("--host", "unix:/tmp/c.sock"), ""),
        (("--host", "unix:///tmp/c.sock"), ""),
        (("--host", "unix:c.sock"), ""),
        (("--host", "unix-abstract:chromarpc"), ""),
        (("--host", "[::1]", "--metrics-host", "[::1]", "--metrics-port", "0"), ""),
        (("--host", "[::1]", "--port", "50052"), ""),
        (("--host", "unix:/tmp/c.sock", "--port", "50052"), "has no port"),
        (("--host", "unix:"), "a path follows"),
        (("--host", "unix:/tmp/"), "a path follows"),
        (("--host", "unix://tmp/c.sock"), "absolute path"),
        (("--host", "unix-abstract:"), "a name follows"),
        (("--host", "unix:/" + "x" * 107), "at most 107 bytes"),
        (("--host", "[::1"), "brackets hold an IPv6 address"),
        (("--host", "[127.0.0.1]"), "brackets hold an IPv6 address"),
        (("--host", "127.0.0.1:50051"), "without a port"),
        (("--host", "[::]"), "not a loopback address"),
        (("--metrics-host", "unix:/tmp/m.sock"), "only gRPC is served on a Unix socket"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_hosts_are_taken_or_refused_by_name(flags: tuple[str, ...], told: str) -> None:
    said = refusal(ServerSettings, *flags)
    assert bool(said) == bool(told), said
    assert told in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--web-host", "[::1]", "--host", "[::1]"), ""),
        (("--web-upstream", "[::1]:50051"), ""),
        (("--web-host", "unix:/tmp/w.sock"), "only gRPC is served on a Unix socket"),
        (("--host", "unix:/tmp/c.sock"), "--host unix:/tmp/c.sock: the gateway reaches a server by TCP only"),
        (
            ("--web-upstream", "unix:/tmp/c.sock"),
            "--web-upstream unix:/tmp/c.sock: the gateway reaches a server by",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_the_gateway_takes_ipv6_and_refuses_unix_sockets_by_name(flags: tuple[str, ...], told: str) -> None:
    said = refusal(WebSettings, *flags)
    assert bool(said) == bool(told), said
    assert told in said


def test_the_gateway_knows_an_ipv6_server_without_its_brackets() -> None:
    for flags in (("--host", "::1"), ("--web-upstream", "[::1]:50051")):
        gateway = CliApp.run(WebSettings, cli_args=["--web-host", "::1", *flags]).gateway(50051)
        assert (gateway.web_host, gateway.grpc_host, gateway.grpc_port) == ("::1", "::1", 50051)


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("[::1]:50052", "[::1]:50052"),
        ("::1:50051", "[::1]:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("fe80::1", "[fe80::1]:50051"),
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("gpu:50051", "gpu:50051"),
        ("unix:/tmp/c.sock", "unix:/tmp/c.sock"),
        ("unix:///tmp/c.sock", "unix:///tmp/c.sock"),
        ("unix-abstract:chromarpc", "unix-abstract:chromarpc"),
        ("dns:///gpu:50051", "dns:///gpu:50051"),
        ("ipv6:[::1]:50051", "ipv6:[::1]:50051"),
    ],
)
def test_a_clients_target_is_made_whole(given: str, target: str) -> None:
    assert connection(given, token=None, tls=False, allow_insecure_token=False).target == target


def test_a_target_that_may_mean_two_things_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write \[::1\]:8080 or \[::1:8080\]:50051"):
        connection("::1:8080", token=None, tls=False, allow_insecure_token=False)


@pytest.mark.parametrize("target", ["unix:/tmp/c.sock", "unix-abstract:x", "[::1]:50051", "::1:50051", "::1"])
def test_a_token_may_go_to_this_machine_without_tls(target: str) -> None:
    assert connection(target, token="t", tls=False, allow_insecure_token=False).metadata


@pytest.fixture
def room() -> Callable[[Path], None]:
    from chromarpc_server.transport.addresses import room_for

    def make(path: Path) -> None:
        with room_for(f"unix:{path}"), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))

    return make


def test_what_a_killed_server_left_makes_room(room: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    for _ in range(2):  # the second time over what the first one left
        room(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_socket_that_somebody_listens_on_is_left_alone(room: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(OSError, match="another server listens there"):
            room(path)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_what_is_no_socket_is_left_alone(room: Callable[[Path], None], tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("precious")
    folder.mkdir()
    link.symlink_to(file)
    for path in (file, folder, link):
        with pytest.raises(OSError, match="no socket; it is left as it is"):
            room(path)
    assert (file.read_text(), folder.is_dir(), link.is_symlink()) == ("precious", True, True)
    with pytest.raises(OSError, match="is not a folder"):
        room(file / "c.sock")
