"""A Ray cluster on this machine: a head, and hosts with a raylet, an address and processes of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")
STORE_BYTES = 80_000_000
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # So that hosts give a head up within a test, and not after a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


@dataclass
class RayNode:
    """What one `ray start` started, in a process group of its own."""

    group: int
    address: str

    def signal(self, number: int) -> None:
        """To everything that it has."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def pids(self, name: str) -> list[int]:
        """Of its processes whose command line has this in it."""
        return [pid for pid in _group(self.group) if name in _command(pid)]

    @property
    def is_alive(self) -> bool:
        return bool(self.pids("/raylet/raylet "))

    @property
    def raylet(self) -> int:
        return self.pids("/raylet/raylet ")[0]

    @property
    def actors(self) -> list[int]:
        """Of ours."""
        return self.pids("ray::DeviceActor")

    def kill(self) -> None:
        """SIGKILL to everything, until nothing is left."""
        until(lambda: self.signal(signal.SIGKILL) or not _group(self.group), f"{self.address} is gone")


def _group(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # After the name in parentheses: state, parent, group.
            state, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def until(
    holds: Callable[[], object], what: str, limit_s: float = 60.0, *, told: Callable[[], str] = lambda: ""
) -> None:
    """Waits for it; `told` is asked where it does not come."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, f"not in {limit_s:g} s: {what}\n{told()}"
        time.sleep(0.05)


@dataclass
class RayCluster:
    """Begins with a head that computes nothing."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")))
    """Short: Ray has sockets in it."""
    port: int = 0
    head: RayNode | None = None
    hosts: list[RayNode] = field(default_factory=list)
    made: int = 0
    """Hosts so far: none has the address of one before it."""

    def start_head(self) -> None:
        """Again at the same address, after the first time."""
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("", 0))
                self.port = probe.getsockname()[1]
        self.head = self._start("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false",
                                f"--temp-dir={self.folder}", address="head")  # fmt: skip

    def add_host(self, cpus: int = 1) -> RayNode:
        """Another raylet, at an address of its own."""
        self.made += 1
        address = f"127.0.0.{self.made + 1}"
        host = self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--node-ip-address={address}",
                           address=address)  # fmt: skip
        self.hosts.append(host)
        return host

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def host_of(self, pid: int) -> RayNode:
        """Where a process runs."""
        return next(host for host in self.hosts if host.group == os.getpgid(pid))

    def _start(self, *flags: str, address: str) -> RayNode:
        command = [str(RAY), "start", *flags, "--num-gpus=0", f"--object-store-memory={STORE_BYTES}",
                   "--disable-usage-stats"]  # fmt: skip
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        node = RayNode(process.pid, address)
        said, _ = process.communicate(timeout=120)
        if process.returncode:
            node.kill()
            raise AssertionError(f"ray did not start: {said}")
        return node

    def mend(self) -> None:
        """Starts what a test has ended."""
        for host in self.hosts:
            host.signal(signal.SIGCONT)
        if self.head is None or not self.head.is_alive:
            for node in [*self.hosts, *([self.head] if self.head else [])]:
                node.kill()
            self.start_head()
        count, self.hosts = len(self.hosts), [host for host in self.hosts if host.is_alive]
        for _ in range(count - len(self.hosts)):
            self.add_host()

    def close(self) -> None:
        """Leaves nothing behind."""
        for node in [*self.hosts, *([self.head] if self.head else [])]:
            node.signal(signal.SIGCONT)
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def holds(self, text: str) -> list[Path]:
        """Files of Ray's that have this in them."""
        found = []
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    if text.encode() in path.read_bytes():
                        found.append(path)
        return found


@contextlib.contextmanager
def ray_cluster(hosts: int = 2) -> Iterator[RayCluster]:
    """One that is gone in the end."""
    cluster = RayCluster()
    try:
        cluster.start_head()
        for _ in range(hosts):
            cluster.add_host()
        yield cluster
    finally:
        cluster.close()
