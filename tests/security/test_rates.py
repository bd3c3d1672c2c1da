"""Calls begun in a minute, by each caller and from each peer; and peers that send tokens which nobody has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import chromarpc
from chromarpc.v1.model_service_pb2 import GetServerInfoRequest
from chromarpc.v1.model_service_pb2_grpc import ModelServiceStub
from chromarpc_server.domain.errors import QuotaExceeded
from chromarpc_server.transport.access.bad_tokens import FREE_FAILURES, BadTokens
from chromarpc_server.transport.access.peers import peer_address
from chromarpc_server.transport.access.rates import TokenBuckets, burst
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS
from tests.security.test_quotas import quota_of

Serve = Callable[..., RunningServer]
Callers = Callable[..., Path]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(buckets: TokenBuckets, key: str, per_minute: int) -> int:
    """How many tokens there are to take at once."""
    count = 0
    while buckets.wait_s(key, per_minute) == 0:
        buckets.take(key, per_minute)
        count += 1
    return count


@pytest.mark.parametrize(("per_minute", "at_once"), [(12_000, 2400), (60, 12), (7, 7), (1, 1), (0, 0)])
def test_a_bucket_gives_a_burst_and_then_its_rate(per_minute: int, at_once: int) -> None:
    clock = Clock()
    buckets = TokenBuckets(clock=clock)
    assert taken(buckets, "a", per_minute) == at_once
    if per_minute:
        assert burst(per_minute) == at_once
        clock.now += 600
        assert taken(buckets, "a", per_minute) == at_once  # no more is saved up
        in_a_minute = 0
        for _ in range(60):
            clock.now += 1
            in_a_minute += taken(buckets, "a", per_minute)
        assert in_a_minute == pytest.approx(per_minute, abs=1)


@pytest.mark.parametrize("per_minute", [12_000, 601, 60, 7, 1])
def test_whoever_waits_as_long_as_told_is_let_through_and_not_much_sooner(per_minute: int) -> None:
    clock = Clock()
    buckets = TokenBuckets(clock=clock)
    for _ in range(50):
        taken(buckets, "a", per_minute)
        wait_s = buckets.wait_s("a", per_minute)
        clock.now += wait_s * 0.9 - 0.001
        assert buckets.wait_s("a", per_minute) > 0
        clock.now += wait_s * 0.1 + 0.001
        assert buckets.wait_s("a", per_minute) == 0


def test_one_that_may_make_no_calls_is_not_told_to_wait() -> None:
    assert math.isinf(TokenBuckets().wait_s("a", 0))


def test_buckets_and_failures_of_many_peers_are_bounded_and_the_quiet_go_first() -> None:
    clock = Clock()
    buckets, failures = TokenBuckets(max_buckets=3, clock=clock), BadTokens(max_peers=3, clock=clock)
    assert taken(buckets, "busy", 1) == 1
    for _ in range(FREE_FAILURES):
        failures.failed("busy")
    for index in range(100):
        buckets.take(f"peer{index}", 1)
        buckets.take("busy", 1)
        failures.failed(f"peer{index}")
        with pytest.raises(QuotaExceeded):
            failures.failed("busy")
        assert len(buckets) <= 3
        assert len(failures) <= 3
    assert buckets.wait_s("busy", 1) > 60


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:50234", "ipv4:192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:50234", "ipv6:%5B2001:db8::1%5D"),
        ("unix:", "unix"),
        ("unix:/run/chromarpc.sock", "unix"),
        ("unix-abstract:chromarpc", "unix"),
        ("", ""),
    ],
)
def test_a_peer_is_its_address_and_a_unix_socket_is_one(peer: str, address: str) -> None:
    assert peer_address(peer) == address


def test_a_peer_without_a_known_token_waits_twice_as_long_each_time_and_is_forgiven() -> None:
    clock = Clock()
    failures = BadTokens(clock=clock)

    def wait_s() -> float | None:
        with pytest.raises(QuotaExceeded) as caught:
            failures.failed("a")
        return caught.value.retry_after_s

    for _ in range(FREE_FAILURES):
        failures.failed("a")
    waits = []
    for _ in range(9):
        told = wait_s()
        assert told is not None
        assert wait_s() == told  # whoever does not wait is not punished further
        waits.append(told)
        clock.now += told
        failures.failed("a")
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    failures.failed("b")  # others are not concerned
    clock.now += 180
    failures.failed("a")
    assert wait_s() == 16  # three are forgiven, and one came
    clock.now += 3600
    for _ in range(FREE_FAILURES):
        failures.failed("a")


def test_a_caller_s_calls_are_counted_told_and_come_back(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file(alice="max_calls_per_minute = 3"))
    alice = (("authorization", f"Bearer {TOKENS['alice']}"),)
    with grpc.insecure_channel(server.target) as channel:
        models, health = ModelServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        for _ in range(3):
            assert models.GetServerInfo(GetServerInfoRequest(), metadata=alice).limits.max_calls_per_minute == 3
        with pytest.raises(grpc.RpcError) as caught:
            models.GetServerInfo(GetServerInfoRequest(), metadata=alice)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        subject, description, wait_s = quota_of(caught.value)
        assert (subject, description) == ("caller", "max_calls_per_minute=3: you make more calls than 3 a minute")
        assert wait_s is not None
        assert 0 < wait_s <= 20
        for _ in range(20):
            health.Check(health_pb2.HealthCheckRequest())
    with chromarpc.Client(server.target, token=TOKENS["bob"]) as bob:
        assert bob.server_info().limits.max_calls_per_minute == 12_000


def test_callers_at_one_address_share_its_calls(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file(), limits={"max_calls_per_minute_per_peer": 2})
    with (
        chromarpc.Client(server.target, token=TOKENS["alice"]) as alice,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        assert alice.server_info()
        assert bob.server_info()
        with pytest.raises(chromarpc.QuotaExceeded) as caught:
            bob.server_info()
    assert caught.value.metadata == {"subject": "peer", "quota": "max_calls_per_minute", "limit": "2"}


def test_bad_tokens_are_refused_and_good_ones_of_the_same_address_pass(
    serve: Serve, callers_file: Callers
) -> None:
    server = serve(callers=callers_file())

    def code(*metadata: tuple[str, str]) -> tuple[grpc.StatusCode, Any]:
        with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
            ModelServiceStub(channel).GetServerInfo(GetServerInfoRequest(), metadata=metadata)
        return caught.value.code(), caught.value

    for index in range(FREE_FAILURES):
        assert code(("authorization", f"Bearer wrong{index}"))[0] is grpc.StatusCode.UNAUTHENTICATED
    for metadata in ([("authorization", f"Bearer {TOKENS['alice']}x")], [("authorization", "Basic x")]):
        refused, error = code(*metadata)
        assert refused is grpc.StatusCode.RESOURCE_EXHAUSTED
        subject, description, wait_s = quota_of(error)
        assert (subject, description.partition("=")[0]) == ("peer", "bad_tokens")
        assert wait_s is not None
        assert 0 < wait_s <= 1
        # The same words whatever was wrong.
        assert error.details() == "too many calls from your address had no token that this server knows"
    # Whoever has none yet is asked for one, whatever its neighbours behind the same gateway do.
    for _ in range(FREE_FAILURES + 1):
        assert code()[0] is grpc.StatusCode.UNAUTHENTICATED
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        assert alice.server_info().caller == "alice"
