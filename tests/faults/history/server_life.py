"""The server of a run, through all its processes, always at one address."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.faults.processes import ServerProcess

READY_TIMEOUT_S = 180.0
GRACE_S = 2.0
EXIT_TIMEOUT_S = 60.0
"""A process that was asked to end and has not ended by then hangs."""
_BELOW_EPHEMERAL = range(20_000, 32_000)
"""Ports that no client's connection gets by chance while the server is away."""
_POLL_S = 0.05


def free_port() -> int:
    """One on which nobody listens."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(_BELOW_EPHEMERAL)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServerLife:
    """Starts processes of one server, one after the other, and ends them."""

    def __init__(
        self,
        checkpoint: Path,
        data_dir: Path,
        flags: Sequence[str],
        *,
        module: str,
        environment: Mapping[str, str],
    ) -> None:
        """`flags`: further ones of `chromarpc-server`; `module`: what is run instead of it; `environment`: of its
        processes, beside this one's.
        """
        self._checkpoint = checkpoint
        self.data_dir = data_dir
        self._port = free_port()
        self._flags = ["--port", str(self._port), "--threads", "1", "--preload", "chroma-mini"]
        self._flags += ["--grace-s", f"{GRACE_S:g}", *flags]
        self._module = module
        self._environment = environment
        self.target = f"127.0.0.1:{self._port}"
        self.starts = 0
        self.logs: list[str] = []
        """What each process that has ended wrote to standard error."""
        self._server: ServerProcess | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        """The one that runs."""
        assert self._server is not None
        return self._server.process

    def start(self) -> None:
        """Starts a process, and does not wait for it."""
        self.starts += 1
        with _in_environment(self._environment):
            self._server = ServerProcess(
                self._checkpoint,
                self.data_dir,
                *self._flags,
                module=self._module,
                awaits_serving=False,
            )

    def await_ready(self, timeout_s: float = READY_TIMEOUT_S) -> bool:
        """Returns whether the server took requests in time."""
        deadline = time.monotonic() + timeout_s
        with grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(grpc.RpcError):
                    request = health_pb2.HealthCheckRequest(service="readiness")
                    answer = stub.Check(request, timeout=5, wait_for_ready=True)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return True
                time.sleep(_POLL_S)
        return False

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def await_exit(self) -> int | None:
        """The exit code of a process that was asked to end; None if it hangs, and then it is killed."""
        try:
            return self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        self.close()

    def close(self) -> None:
        """Leaves no process behind."""
        if self._server is not None:
            self._server.close()
            self.logs.append(self._server.log)
            self._server = None


@contextlib.contextmanager
def _in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
