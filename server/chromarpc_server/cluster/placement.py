"""Where actors are placed: the process that talks to Ray, as the event loop sees it; started anew when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from chromarpc_server.cluster.invitation import Invitation
from chromarpc_server.runtime.running_time import RunningTime

log = logging.getLogger(__name__)

START_S = 60.0
"""For joining a cluster, or starting one."""
ANSWER_S = 15.0
"""After so long without an answer the head is taken to be gone."""
GIVE_UP_S = 90.0
"""After so long the driver is ended: Ray itself has given the head up by then."""
RETRY_S = (1.0, 2.0, 5.0, 10.0)
"""Before the driver is started again; the last one holds."""


@dataclass(frozen=True)
class Cluster:
    """What Ray has."""

    gpus: int = 0
    cpus: int = 0


class Placing(Protocol):
    """Who is told by a placement. Called on the event loop."""

    def cluster_up(self, address: str, node_ip: str) -> None:
        """A cluster answers, none of whose actors are ours yet."""
        ...

    def cluster_gone(self, why: str) -> None:
        """It answers no more, in one sentence; its actors may still be there."""
        ...

    def actor_ended(self, actor: str, why: str) -> None:
        """An actor ended, or could not be started."""
        ...


class RayPlacement:
    """Keeps the driver running. Lives on the event loop."""

    def __init__(self, address: str | None, *, on_cpus: bool, least: int, running_time: RunningTime) -> None:
        """Starts nothing; see `open`.

        Args:
            address: the cluster's; None for `RAY_ADDRESS`, one that runs on this machine, or one of its own.
            on_cpus: whether actors compute on CPUs.
            least: actors that a cluster of its own has CPUs for, at least.
            running_time: the event loop's.
        """
        self._address = address
        self._on_cpus = on_cpus
        self._least = least
        self._running_time = running_time
        self._listener: Placing | None = None
        self._process: subprocess.Popen[str] | None = None
        self._tries = 0
        self._is_closed = False
        self._heard_at = 0.0
        self._is_up = False
        self._is_answering = False
        self._said = ""
        """By Ray, last."""
        self._why_gone = ""
        self._watching: asyncio.Task[None] | None = None
        self.cluster = Cluster()
        """As Ray last said."""

    @property
    def is_answering(self) -> bool:
        """Whether Ray's head answers."""
        return self._is_answering

    def open(self, listener: Placing) -> None:
        """Joins a cluster, again and again until there is one."""
        self._listener = listener
        self._start()
        self._watching = asyncio.create_task(self._watch(), name="ray placement")

    def start_actor(self, invitation: Invitation) -> None:
        """Asks for an actor, which Ray places once there is room."""
        self._order(do="start", actor=invitation.actor, invitation=asdict(invitation))

    def end_actor(self, actor: str) -> None:
        """Ends it, wherever it is."""
        self._order(do="end", actor=actor)

    def close(self) -> None:
        """Leaves the cluster, which ends all actors."""
        self._is_closed = True
        if self._watching is not None:
            self._watching.cancel()
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _start(self) -> None:
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
            # Ray warns of what a later version will do; nothing here depends on it.
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "chromarpc_server.cluster.ray_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A terminal's Ctrl-C is for the server, which ends it in good order.
            start_new_session=True,
        )
        self._process = process
        self._heard_at = self._running_time.now()
        self._is_up = self._is_answering = False
        self._order(address=self._address, least=self._least, on_cpus=self._on_cpus)
        loop = asyncio.get_running_loop()
        for name, read in (("answers", self._read_answers), ("errors", self._read_errors)):
            threading.Thread(target=read, args=(process, loop), name=f"ray-{name}", daemon=True).start()

    def _order(self, **order: object) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with suppress(OSError, ValueError):  # it ended, which is noticed elsewhere
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _read_answers(self, process: subprocess.Popen[str], loop: asyncio.AbstractEventLoop) -> None:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        for line in process.stdout:
            with suppress(ValueError, RuntimeError):
                loop.call_soon_threadsafe(self._answered, process, json.loads(line))
        process.wait()
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._driver_ended, process)

    def _read_errors(self, process: subprocess.Popen[str], _: asyncio.AbstractEventLoop) -> None:
        """Ray's own words stay out of the log, but for the last when something is wrong."""
        assert process.stderr is not None  # noqa: S101 - it was asked for
        for line in process.stderr:
            if line.strip():
                self._said = line.strip()[:500]

    def _answered(self, process: subprocess.Popen[str], answer: dict[str, Any]) -> None:
        if process is not self._process or self._is_closed or self._listener is None:
            return
        self._heard_at = self._running_time.now()
        if "up" in answer:
            self._is_up = self._is_answering = True
            self._tries, self._why_gone = 0, ""
            log.info("ray.joined", extra={"address": answer["up"]})
            # A cluster that was joined once is the one to come back to, not one of our own in its place.
            self._address = self._address or answer["up"]
            self._listener.cluster_up(answer["up"], answer["node_ip"])
        elif "failed" in answer:
            self._say_gone(f"Ray cannot be reached: {answer['failed']}")
        elif "ended" in answer:
            self._listener.actor_ended(answer["ended"], answer["why"])
        elif "gpus" in answer:
            self.cluster = Cluster(answer["gpus"], answer["cpus"])
            self._is_answering, self._why_gone = True, ""

    def _driver_ended(self, process: subprocess.Popen[str]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        if process is not self._process or self._is_closed:
            return
        if self._is_up:
            self._say_gone("the process that speaks to Ray ended: the cluster's head is gone, or its node here is")
        self._process = None
        self._is_up = self._is_answering = False
        delay_s = RETRY_S[min(self._tries, len(RETRY_S) - 1)]
        self._tries += 1
        asyncio.get_running_loop().call_later(delay_s, self._restart)

    def _restart(self) -> None:
        if not self._is_closed and self._process is None:
            self._start()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            process = self._process
            if process is None:
                continue
            silent_s = self._running_time.since(self._heard_at)
            if self._is_answering and silent_s > ANSWER_S:
                self._is_answering = False
                self._say_gone("Ray's head does not answer")
            if silent_s > (GIVE_UP_S if self._is_up else START_S):
                self._say_gone("Ray's head does not answer")
                process.kill()

    def _say_gone(self, why: str) -> None:
        if self._listener is None or why == self._why_gone:
            return
        log.warning("ray.gone", extra={"why": why, **({"ray": self._said} if self._said else {})})
        self._said, self._why_gone = "", why
        self._listener.cluster_gone(why)
