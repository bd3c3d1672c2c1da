"""The one process that Ray runs in on the server's side: it asks Ray for actors, and says when one ended.

A process of its own, because Ray takes over whatever it is loaded into: it replaces signal handlers, and ends the
process when the cluster's head is gone for long. This one may be ended and started again at any time; its actors
end with it. It is told what to do on standard input and answers on standard output, in lines of JSON. Nothing of
a request ever comes here.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from chromarpc_server.cluster.actor import DeviceActor
from chromarpc_server.cluster.invitation import Invitation

WAIT_S = 0.1
"""How long an order, or the end of an actor, may go unnoticed."""
TELL_EVERY_S = 1.0
"""How often it asks the head what the cluster has, and so shows that the head answers."""
OWN_STORE_BYTES = 80 * 1024**2
"""Ray's object store, which holds nothing of ours, in a cluster of our own; the least that Ray takes."""
OWN = "local"
"""The address of a cluster of our own."""
_LEAVE_S = 5.0
CONNECT_S = 3.0
_ERROR = re.compile(r"[\w.]+(Error|Exception): ")


@dataclass
class _Placed:
    """An actor, placed or waiting to be."""

    handle: Any
    ended: Any
    """What Ray calls a reference to the result of `serve`, which never comes."""


class Driver:
    """Does what it is told."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        """`orders`: lines to read; `answers`: where lines are written."""
        self._orders = orders
        self._answers = answers
        self._telling = threading.Lock()
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._actors: dict[str, _Placed] = {}

    def run(self) -> None:
        """Returns once its orders end."""
        import ray  # noqa: PLC0415 - an extra, which takes long

        first = json.loads(self._orders.readline() or "{}")
        try:
            address, is_own = _connect(ray, first.get("address"), first.get("least", 0), on_cpus=first["on_cpus"])
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds; the server says why it waits
            self._tell(failed=_first_line(error))
            return
        self._tell(up=address, node_ip=ray.util.get_node_ip_address(), is_own=is_own)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._tell_cluster, args=(ray,), daemon=True).start()
        resources = {"num_cpus": 1, "num_gpus": 0} if first["on_cpus"] else {"num_cpus": 0, "num_gpus": 1}
        kind = ray.remote(DeviceActor).options(**resources, max_restarts=0, max_task_retries=0)
        while self._obey(ray, kind):
            self._notice_ends(ray)
        # Ray's own way to leave asks the head, which may be gone.
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)

    def _obey(self, ray: Any, kind: Any) -> bool:
        """Does what was ordered meanwhile; False once there are no more orders."""
        wait_s = 0.0 if self._actors else WAIT_S
        while True:
            try:
                order = self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            except queue.Empty:
                return True
            wait_s = 0.0
            if order is None:
                return False
            name = order["actor"]
            if order["do"] == "start":
                handle = kind.remote()
                self._actors[name] = _Placed(handle, handle.serve.remote(Invitation(**order["invitation"])))
            elif (placed := self._actors.pop(name, None)) is not None:
                ray.kill(placed.handle, no_restart=True)

    def _notice_ends(self, ray: Any) -> None:
        by_reference = {placed.ended: name for name, placed in self._actors.items()}
        if not by_reference:
            return
        ended, _ = ray.wait(list(by_reference), num_returns=1, timeout=WAIT_S)
        for reference in ended:
            name = by_reference[reference]
            del self._actors[name]
            try:
                ray.get(reference, timeout=0)
            except Exception as error:  # noqa: BLE001 - an actor's end is always one
                self._tell(ended=name, why=_why(error))
            else:
                self._tell(ended=name, why="")

    def _tell_cluster(self, ray: Any) -> None:
        pause = threading.Event()
        while True:
            try:
                found = ray.cluster_resources()
            except Exception:  # noqa: BLE001 - no answer says enough
                found = None
            if found is not None:
                self._tell(gpus=int(found.get("GPU", 0)), cpus=int(found.get("CPU", 0)))
            pause.wait(TELL_EVERY_S)

    def _listen(self) -> None:
        for line in self._orders:
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def _tell(self, **what: object) -> None:
        with self._telling:
            try:
                self._answers.write(json.dumps(what) + "\n")
                self._answers.flush()
            except OSError:  # the server is gone, and its orders end
                pass


def _connect(ray: Any, address: str | None, least: int, *, on_cpus: bool) -> tuple[str, bool]:
    """Joins a running cluster, or starts one of its own where none is named and none runs.

    Returns its address, and whether it is one of its own.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    named = address or os.environ.get("RAY_ADDRESS")
    if named and named != OWN:
        _require_reachable(named)
        return _address(ray.init(address=named, **quiet)), False
    if not named:
        with suppress(ConnectionError):
            return _address(ray.init(address="auto", **quiet)), False
    # Nothing outside this machine needs to reach it.
    cpus = {"num_cpus": max(1, least)} if on_cpus else {}
    ray.init(
        address=OWN,
        include_dashboard=False,
        object_store_memory=OWN_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        **cpus,
        **quiet,
    )
    return OWN, True


def _require_reachable(address: str) -> None:
    """Ray itself tries for a minute.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


def _address(context: Any) -> str:
    return str(context.address_info.get("gcs_address") or context.address_info.get("address") or "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:500]


def _why(error: BaseException) -> str:
    """Why an actor ended: what Python said there, if it did; Ray's traceback ends with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _ERROR.match(line)]
    return (raised[-1] if raised else lines[0] if lines else type(error).__name__)[:500]


def main() -> None:
    """Runs as a process of its own."""
    # Ray, and what it loads, print to standard output what they like.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    Driver(sys.stdin, answers).run()
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
