"""Ports that are taken are told before anything is loaded, and Envoy never outlives who started it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from chromarpc_server.app import App
from chromarpc_server.settings import ServerSettings
from tests.integration.gateway_stand import free_port

SERVER = [sys.executable, "-m", "chromarpc_server"]
ALONE = ("web", "--web-upstream", "127.0.0.1:1", "--web-port")
"""A gateway that loads no model and no torch."""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield int(listener.getsockname()[1])


def start(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a command says that ends by itself; it is stopped where it does not."""
    command = [*SERVER, *arguments, "--data-dir", str(folder), "--store", "memory", "--device", "cpu"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, -1, str(error.stdout), str(error.stderr))


@pytest.mark.parametrize("grpc_port", ["0", "free"])
def test_a_gateway_port_in_use_is_told_before_the_model_is_loaded(
    taken: int, tmp_path: Path, grpc_port: str
) -> None:
    port = grpc_port if grpc_port == "0" else str(free_port())
    done = start(
        *("web", "--port", port, "--web-port", str(taken), "--preload", "chroma-mini"), folder=tmp_path / "data"
    )
    assert "model.preloading" not in done.stderr
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"chromarpc-server web cannot start: --web-port {taken}: 127.0.0.1:{taken}: Address already in use; "
        "another process listens there"
    ]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "flag"),
    [("web", "--port"), ("web", "--metrics-port"), ("serve", "--port"), ("serve", "--metrics-port")],
)
def test_a_servers_port_in_use_is_told_by_its_flag_before_anything_is_begun(
    taken: int, tmp_path: Path, command: str, flag: str
) -> None:
    ports = {"--port": "0", flag: str(taken)} | ({"--web-port": str(free_port())} if command == "web" else {})
    folder = tmp_path / "data"
    done = start(command, *(part for port in ports.items() for part in port), folder=folder)
    assert f"cannot start: {flag} {taken}: 127.0.0.1:{taken}: Address already in use" in done.stderr
    assert done.returncode == 1
    assert not folder.exists(), "nothing was opened"


async def test_a_host_name_is_not_served_by_halves(taken: int, tmp_path: Path) -> None:
    """`localhost` stands for two addresses; gRPC is content with the one that is left."""
    settings = ServerSettings(host="localhost", port=taken, device="cpu", store="memory", data_dir=tmp_path)
    app = App(settings)
    started = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(app.run(started))
    await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
    is_served = started.done()
    app.stop()
    (problem,) = await asyncio.gather(serving, return_exceptions=True)
    assert not is_served, "another server has 127.0.0.1, and clients would reach that one"
    assert isinstance(problem, OSError)
    assert f"--port {taken}" in str(problem)


def test_two_settings_that_name_one_port_are_told(tmp_path: Path) -> None:
    port = str(free_port())
    done = start("web", "--port", port, "--web-port", port, folder=tmp_path)
    assert f"--port {port} is the port of --web-port too" in done.stderr
    assert done.returncode == 1


@contextmanager
def gateway_process(port: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A gateway in a process of its own, which takes connections."""
    command = [*SERVER, *ALONE, str(port)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("The page is http://127.0.0.1:")
            yield process
        finally:
            process.kill()
            for child in envoys(folder):
                os.kill(child, signal.SIGKILL)


def envoys(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in words and int(entry.parent.name) != os.getpid():
            found.append(int(entry.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_envoy_ends_with_its_parent_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    with (
        gateway_process(port, tmp_path) as process,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        process.send_signal(number)
        process.wait()
        try:
            ended = connection.recv(1) == b""
        except ConnectionResetError:
            ended = True
        except TimeoutError:
            ended = False
        assert ended, "Envoy still serves"
        assert list(tmp_path.iterdir()) == [], "files were left behind"
    with gateway_process(port, tmp_path):
        pass  # the same port again, at once


LEASH = Path(__file__).parents[2] / "server/chromarpc_server/gateway/leash.py"


def leashed(code: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", LEASH, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_leashed_command_ends_as_it_likes() -> None:
    with leashed("raise SystemExit(7)") as process:
        assert process.wait(20) == 7


SLEEPER = "import signal, sys; {} print('up', flush=True); signal.pause(); signal.pause()"


def test_a_leashed_command_is_asked_to_stop() -> None:
    polite = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9));"
    with leashed(SLEEPER.format(polite)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(20) == 9


def test_a_leashed_command_that_does_not_stop_goes_when_the_pipe_closes() -> None:
    stubborn = "signal.signal(signal.SIGTERM, lambda *_: None);"
    with leashed(SLEEPER.format(stubborn)) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        process.stdin.close()
        assert process.wait(20) == 128 + signal.SIGKILL
