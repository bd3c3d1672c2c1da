"""A gateway in front of a port, and a client that asks it over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from chromarpc_server.gateway.configuration import LOOPBACK_NAMES, Gateway
from chromarpc_server.gateway.envoy import Envoy

ENDED = ("succeeded", "failed", "canceled")
SMALL = {"width": 64, "height": 64, "sample_steps": 2}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["detail"]["error"])


@dataclass(frozen=True)
class Web:
    url: str

    def ask(
        self, path: str, body: bytes | dict[str, Any] | None = None, *, method: str | None = None, **headers: str
    ) -> Answer:
        """One request; header names have `_` for `-`."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        told = {"content-type": "application/json"} if data is not None else {}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=data, headers=told, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                return Answer(response.status, _lower(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _lower(error.headers), error.read())


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextmanager
def gateway_to(grpc_port: int, **options: Any) -> Iterator[Web]:
    """An Envoy in front of a port, for as long as the block runs."""
    web_port = free_port()
    gateway = Gateway("127.0.0.1", web_port, "127.0.0.1", grpc_port, names=LOOPBACK_NAMES, **options)
    ready, done = threading.Event(), threading.Event()
    problem: list[BaseException] = []

    async def run() -> None:
        envoy = Envoy(gateway)
        try:
            await envoy.start()
            ready.set()
            await asyncio.to_thread(done.wait)
        except BaseException as error:
            problem.append(error)
            raise
        finally:
            await envoy.stop()
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="gateway")
    thread.start()
    try:
        assert ready.wait(30)
        assert not problem, problem
        yield Web(f"http://127.0.0.1:{web_port}")
    finally:
        done.set()
        thread.join(30)


def wait_until_served(web: Web) -> None:
    """The gateway looks at the server's health once a second."""
    for _ in range(200):
        if web.ask("/health").status == 200:
            return
        time.sleep(0.05)
    pytest.fail("the gateway never saw the server")


def generate(web: Web, body: dict[str, Any]) -> dict[str, Any]:
    """What a script of the reference does: submit, poll, fetch."""
    submitted = web.ask("/v1/inference", body)
    assert submitted.status == 200, submitted.body
    assert submitted.json["status"] == "queued"
    status_path = submitted.json["status_url"].removeprefix(web.url)
    while (state := web.ask(status_path).json)["status"] not in ENDED:
        assert state["status"] in ("in_queue", "in_progress")
    assert state["finished_at"] is not None
    return dict(web.ask(submitted.json["result_url"].removeprefix(web.url)).json)
