"""The address that a server prints is one that every client takes as it is."""

from __future__ import annotations

import asyncio
import re
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import chromarpc
from chromarpc.cli import app
from tests.conftest import RunningServer


def printed(start: Callable[..., RunningServer], host: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The address in the line that a server prints once it serves; empty where it does not take the host."""
    try:
        start(host=host)
    except ValidationError:
        return ""
    found = re.search(r"^chromarpc-server listens on (\S+) \(", capsys.readouterr().out, re.MULTILINE)
    return found.group(1) if found else ""


async def asks(target: str) -> chromarpc.HealthStatus:
    async with chromarpc.AsyncClient(target, token="t") as client:
        return await client.health()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "shape"),
    [
        ("127.0.0.1", r"127\.0\.0\.1:\d+"),
        ("::1", r"\[::1\]:\d+"),
        ("[::1]", r"\[::1\]:\d+"),
        ("unix:FOLDER/c.sock", r"unix:/.*/c\.sock"),
        ("unix://FOLDER/c.sock", r"unix:/.*/c\.sock"),
        pytest.param(
            "unix-abstract:chromarpc FOLDER",
            r"unix-abstract:chromarpc.*",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only"),
        ),
    ],
)
def test_what_is_printed_can_be_pasted(
    serve: Callable[..., RunningServer],
    host: str,
    shape: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if "::" in host and not has_ipv6():
        pytest.skip("this machine has no ::1")
    folder = tmp_path_factory.mktemp("s")  # short: the address of a Unix socket is
    address = printed(serve, host.replace(" ", "").replace("FOLDER", str(folder)), capsys)
    assert re.fullmatch(shape, address)
    with chromarpc.Client(address, token="t") as client:
        assert client.health() is chromarpc.HealthStatus.SERVING
    assert asyncio.run(asks(address)) is chromarpc.HealthStatus.SERVING
    told = CliRunner().invoke(app, ["health", "--target", address])
    assert (told.exit_code, told.stdout) == (0, "SERVING\n")


def test_a_unix_socket_is_for_its_user_alone_and_goes_with_the_server(
    serve: Callable[..., RunningServer],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path_factory.mktemp("s") / "c.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # and never removed
    assert printed(serve, f"unix:{path}", capsys) == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert serve(host=f"unix:{path}.other").stop() == 0
    assert path.exists()
    assert not Path(f"{path}.other").exists()
