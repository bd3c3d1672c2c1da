"""Who has no token of this server's is not listened to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

from chromarpc_server.cluster.certificate import NAME, make_actor_tls, make_server_tls
from chromarpc_server.cluster.hosts_port import HostsPort
from chromarpc_server.cluster.link import MAX_GREETING_BYTES, Link

Arrived = asyncio.Queue[str]


@pytest.fixture
async def arrived() -> Arrived:
    return asyncio.Queue()


@pytest.fixture
async def port(arrived: Arrived) -> AsyncIterator[HostsPort]:
    made = HostsPort(lambda actor, _, link: (arrived.put_nowait(actor), link.abort())[0])
    await made.open("127.0.0.1", 0)
    yield made
    await made.close()


async def _connect(port: HostsPort, trusted: str | None = None) -> Link:
    tls = make_actor_tls(trusted or port.trusted)
    return Link(*await asyncio.open_connection("127.0.0.1", port.port, ssl=tls, server_hostname=NAME))


def _greeting(actor: str, token: str, **changes: Any) -> dict[str, Any]:
    return {"actor": actor, "token": token, "host": "h", "pid": 1, "versions": {}} | changes


async def _is_hung_up_on(link: Link) -> bool:
    try:
        await asyncio.wait_for(link.greeting(), 5)
    except (EOFError, OSError):
        link.abort()
        return True
    return False


async def test_an_actor_is_let_in_once(port: HostsPort, arrived: Arrived) -> None:
    token = port.expect("a")
    for times in range(2):
        link = await _connect(port)
        link.greet(_greeting("a", token))
        assert await _is_hung_up_on(link)
        assert arrived.qsize() == 1, times


@pytest.mark.parametrize(
    "said",
    [
        _greeting("a", ""),
        _greeting("a", "no"),
        _greeting("b", "no"),
        {},
        {"actor": "a"},
        {"token": "x" * MAX_GREETING_BYTES},
    ],
)
async def test_a_stranger_is_hung_up_on(
    port: HostsPort, arrived: Arrived, said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    token = port.expect("a")
    link = await _connect(port)
    link.greet(said)
    assert await _is_hung_up_on(link)
    assert arrived.empty()
    assert [record.msg for record in caplog.records] == ["cluster.stranger"]
    assert token not in caplog.text


@pytest.mark.parametrize("changes", [{"versions": []}, {"pid": float("inf")}, {"pid": None}])
async def test_an_actor_that_says_nonsense_of_itself_is_hung_up_on(
    port: HostsPort, arrived: Arrived, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    link = await _connect(port)
    link.greet(_greeting("a", port.expect("a"), **changes))
    assert await _is_hung_up_on(link)
    assert arrived.empty()
    assert caplog.messages == ["cluster.stranger"]


async def test_a_token_that_was_withdrawn_is_none(port: HostsPort, arrived: Arrived) -> None:
    token = port.expect("a")
    port.forget("a")
    link = await _connect(port)
    link.greet(_greeting("a", token))
    assert await _is_hung_up_on(link)
    assert arrived.empty()


async def test_an_actor_speaks_to_its_own_server_alone(port: HostsPort) -> None:
    _, other = make_server_tls()
    with pytest.raises(ssl.SSLCertVerificationError):
        await _connect(port, other)


async def test_nothing_is_read_without_encryption(port: HostsPort, arrived: Arrived) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    link = Link(reader, writer)
    link.greet(_greeting("a", port.expect("a")))
    assert await _is_hung_up_on(link)
    assert arrived.empty()
