"""Connections that no client library would make: whatever they do, the server serves everybody else."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import chromarpc
from chromarpc_server.transport.access import interceptor
from tests.conftest import RunningServer
from tests.observability.test_metrics import look, value
from tests.security.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    Connection,
    frame,
    literal,
    request_headers,
)

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
INFO = "/chromarpc.v1.ModelService/GetServerInfo"
GENERATE = "/chromarpc.v1.GenerationService/Generate"
Serve = Callable[..., RunningServer]


@contextlib.contextmanager
def connections(port: int, count: int, *, greet: bool = True) -> Iterator[list[Connection]]:
    made = [Connection(port, greet=greet) for _ in range(count)]
    try:
        yield made
    finally:
        for connection in made:
            connection.close()


def assert_serves(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        assert client.generate_images("a", **SMALL)
        assert client.health()


def random_bytes(seed: int, count: int = 4096) -> bytes:
    return random.Random(seed).randbytes(count)


CLIENT_HELLO = bytes.fromhex("16030100510100004d0303") + bytes(32) + bytes.fromhex("000004130113020100")

GARBAGE = {
    "nothing at all": b"",
    "random bytes": random_bytes(1),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": CLIENT_HELLO,
    "a preface and random bytes": PREFACE + random_bytes(2),
    "frames of no kind": PREFACE
    + frame(SETTINGS)
    + b"".join(frame(kind, 0xFF, 1, b"x" * 9) for kind in range(10, 256)),
    "a frame that says it has 16 MiB": PREFACE + frame(SETTINGS) + b"\xff\xff\xff" + bytes([DATA, 0]) + bytes(4),
    "headers of no compression": PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, random_bytes(3, 500)),
    "a path of nothing": PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, request_headers("")),
    "a message longer than it says": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO))
    + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", 5) + b"x" * 50),
    "a message shorter than it says": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO))
    + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", 500) + b"x" * 5),
    "a message of 4 GiB": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO))
    + frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + b"x" * 50),
    "a message said to be compressed": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO, ("grpc-encoding", "gzip")))
    + frame(DATA, END_STREAM, 1, b"\x01" + struct.pack(">I", 5) + b"xxxxx"),
    "an encoding that nobody knows": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO, ("grpc-encoding", "planted")))
    + frame(DATA, END_STREAM, 1, b"\x01" + struct.pack(">I", 5) + b"xxxxx"),
    "a timeout that is none": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO, ("grpc-timeout", "99999999999999H")))
    + frame(DATA, END_STREAM, 1, bytes(5)),
    "binary metadata that is none": PREFACE
    + frame(SETTINGS)
    + frame(HEADERS, END_HEADERS, 1, request_headers(INFO, ("x-bin", "!!!!"), ("grpc-trace-bin", "****")))
    + frame(DATA, END_STREAM, 1, bytes(5)),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_the_port(server: RunningServer, data: bytes) -> None:
    with connections(server.port, 3, greet=False) as made:
        for connection in made:
            connection.send(data)
        assert_serves(server)
    assert_serves(server)


def test_a_gzip_bomb_is_refused_by_its_unpacked_size(server: RunningServer) -> None:
    import gzip

    bomb = gzip.compress(bytes(64 * 2**20))
    with connections(server.port, 1) as (connection,):
        connection.send(frame(HEADERS, END_HEADERS, 1, request_headers(INFO, ("grpc-encoding", "gzip"))))
        message = b"\x01" + struct.pack(">I", len(bomb)) + bomb
        for start in range(0, len(message), 16_000):
            connection.send(frame(DATA, 0, 1, message[start : start + 16_000]))
        connection.send(frame(DATA, END_STREAM, 1))
        assert_serves(server)


def test_headers_without_end_are_cut_off(server: RunningServer) -> None:
    """CONTINUATION frames for ever: the bound on metadata has to hold before the last one."""
    with connections(server.port, 1) as (connection,):
        connection.send(frame(HEADERS, 0, 1, request_headers(INFO)))
        more = frame(CONTINUATION, 0, 1, literal("x", "y" * 1000) * 10)
        sent = 0
        while sent < 64 * 2**20 and connection.send(more):
            sent += len(more)
        assert_serves(server)


def test_half_open_connections_wait_alone_and_not_for_ever(server: RunningServer) -> None:
    with connections(server.port, 100, greet=False) as silent:
        with connections(server.port, 100) as greeted:
            for connection in greeted:
                connection.send(frame(HEADERS, 0, 1, request_headers(INFO)[:10]))
            assert_serves(server)
        # Those that never say who they are are closed after ten seconds.
        silent[0].frames_until_closed()
        assert_serves(server)


def test_a_burst_of_resets_leaves_nothing_behind(serve: Serve) -> None:
    # More calls than a minute has for a caller; what they leave behind is to be seen, not that they are refused.
    limits = {"max_calls_per_minute_per_caller": 10**6, "max_calls_per_minute_per_peer": 10**6}
    server = serve(metrics_port=0, limits=limits)
    assert_serves(server)
    message = b"\x00" + struct.pack(">I", 0)
    with connections(server.port, 4) as made:
        for index in range(2000):
            stream = 2 * index + 1
            burst = frame(HEADERS, END_HEADERS, stream, request_headers(GENERATE))
            burst += frame(DATA, 0, stream, message) + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
            for connection in made:
                connection.send(burst)
        assert_serves(server)
    deadline = time.monotonic() + 30
    while value(look(server), "chromarpc_calls_in_progress") > 0:
        assert time.monotonic() < deadline
    assert_serves(server)


def test_a_request_that_comes_byte_by_byte_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "RECEIVE_TIMEOUT_S", 5.0)
    server = serve(limits={"max_streams_per_caller": 40})
    with connections(server.port, 20) as made:
        for connection in made:
            connection.send(frame(HEADERS, END_HEADERS, 1, request_headers(GENERATE)))
            connection.send(frame(DATA, 0, 1, b"\x00" + struct.pack(">I", 1000) + b"x"))
        assert_serves(server)
        for connection in made:
            while b"grpc-status" not in connection.socket.recv(65536):
                connection.send(frame(DATA, 0, 1, b"x"))
        assert_serves(server)


def test_a_stranger_is_refused_before_the_request_has_come(serve: Serve, callers_file: Any) -> None:
    server = serve(callers=callers_file())
    with connections(server.port, 1) as (connection,):
        connection.send(frame(HEADERS, END_HEADERS, 1, request_headers(GENERATE)))
        # Nothing of the request is sent: an answer can only be about who calls.
        answer = b""
        while b"grpc-status" not in answer:
            answer += connection.socket.recv(65536)
        assert b"16" in answer


def test_pings_too_often_end_the_connection(server: RunningServer) -> None:
    with connections(server.port, 1) as (connection,):
        while connection.send(frame(PING, 0, 0, bytes(8)) * 10):
            pass
    with connections(server.port, 1) as (connection,):
        for _ in range(10):
            connection.send(frame(PING, 0, 0, bytes(8)))
        frames = connection.frames_until_closed()
        assert any(kind == GOAWAY and b"too_many_pings" in payload for kind, payload in frames)
    assert_serves(server)


def test_settings_and_acks_without_end(server: RunningServer) -> None:
    with connections(server.port, 1) as (connection,):
        flood = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 500 + frame(SETTINGS, ACK) * 500
        for _ in range(50):
            if not connection.send(flood):
                break
        assert_serves(server)


def test_more_connections_than_may_be(serve: Serve) -> None:
    server = serve(limits={"max_connections": 10})
    with (
        connections(server.port, 10),
        pytest.raises(chromarpc.StatusError),
        chromarpc.Client(server.target) as client,
    ):
        client.server_info(timeout_s=2)
    deadline = time.monotonic() + 30
    while True:
        try:
            assert_serves(server)
            break
        except chromarpc.StatusError:
            assert time.monotonic() < deadline
