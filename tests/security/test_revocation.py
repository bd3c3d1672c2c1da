"""A caller that is no longer known, or no longer by the token that it called with: its calls in progress end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc.v1 import job_service_pb2
from chromarpc_server.domain.errors import Unauthenticated
from chromarpc_server.transport.access import interceptor
from chromarpc_server.transport.access.interceptor import Call
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS, Pems, entry, sha256_of

LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
NEW_TOKEN = "chromarpc_new-" + "n" * 40
Serve = Callable[..., RunningServer]
Callers = Callable[..., Path]


def drawing(client: chromarpc.Client, **options: Any) -> Any:
    """A stream that has begun to draw."""
    events = client.generate("a", **LONG, **options)
    assert any(isinstance(event, chromarpc.Step) for event in events)
    return events


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(entry("alice", TOKENS["alice"]), ""),
        lambda text: text.replace(sha256_of(TOKENS["alice"]), sha256_of(NEW_TOKEN)),
        lambda text: text.replace('"alice"', '"alicia"'),
    ],
    ids=["removed", "another token", "another name"],
)
def test_streams_of_a_revoked_caller_end_though_no_other_call_comes(
    serve: Serve, callers_file: Callers, change: Callable[[str], str]
) -> None:
    path = callers_file()
    server = serve(callers=path)
    with (
        chromarpc.Client(server.target, token=TOKENS["alice"]) as alice,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        running = drawing(alice)
        others = bob.create_job("b", **LONG)
        watching = bob.watch_job(others.job_id)
        next(watching)
        path.write_text(change(path.read_text()))
        with pytest.raises(chromarpc.AccessDenied, match="no longer knows"):
            list(running)
        # Nobody holds on to the job any more, so the device is free for the next one.
        assert any(isinstance(event, chromarpc.Step) for event in watching)
        bob.cancel_job(others.job_id)


def test_a_caller_whose_limits_change_is_left_alone_and_one_that_gets_a_second_token_too(
    serve: Serve, callers_file: Callers
) -> None:
    path = callers_file()
    server = serve(callers=path)
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        running = drawing(alice)
        sha256, new = sha256_of(TOKENS["alice"]), sha256_of(NEW_TOKEN)
        path.write_text(f'[[callers]]\nname = "alice"\ntoken_sha256 = ["{new}", "{sha256}"]\nmax_streams = 2\n')
        server.loop.call_soon_threadsafe(server.app.reload)
        with chromarpc.Client(server.target, token=NEW_TOKEN) as renewed:
            assert renewed.server_info().limits.max_streams == 2
        # What ends it comes at the next look, or with the reload that the new call above has seen.
        assert any(isinstance(event, chromarpc.Step) for event in running)
        running.cancel()


def test_a_job_of_a_revoked_caller_waits_as_after_a_lost_connection(
    serve: Serve, callers_file: Callers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    path = callers_file()
    server = serve(callers=path)
    text = path.read_text()
    with chromarpc.Client(server.target, token=TOKENS["alice"]) as alice:
        running = drawing(alice, request_id="9f0f1b1e-7f62-4f53-8a53-b0f0cf6a3a63")
        path.write_text(text.replace(entry("alice", TOKENS["alice"]), ""))
        server.loop.call_soon_threadsafe(server.app.reload)
        with pytest.raises(chromarpc.AccessDenied):
            list(running)
        assert "job.caller_away" in [record.getMessage() for record in caplog.records]
        path.write_text(text + "# changed\n")
        server.loop.call_soon_threadsafe(server.app.reload)
        (job,) = alice.list_jobs()
        assert job.state == job_service_pb2.JOB_STATE_RUNNING
        alice.cancel_job(job.job_id)


def test_a_certificate_that_is_no_longer_named_ends_its_streams(
    serve: Serve, pems: Pems, callers_file: Callers
) -> None:
    path = callers_file()
    text = path.read_text()
    path.write_text(text + '[[callers]]\nname = "renderer"\ncertificate = "renderer.example"\n')
    server = serve(tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca, callers=path)
    tls = chromarpc.TlsOptions(pems.ca, pems.client_cert, pems.client_key)
    with chromarpc.Client(server.target, tls=tls) as renderer:
        running = drawing(renderer)
        path.write_text(text)
        with pytest.raises(chromarpc.AccessDenied):
            list(running)


class Context:
    """A call's context, of which nothing else is asked."""

    def peer(self) -> str:
        return "unix:"


async def test_a_call_that_is_ended_while_it_sends_ends_after_the_message() -> None:
    call = Call("/a.B/C", Context(), streams=True)
    error = Unauthenticated("gone")
    call.begin_sending()
    asyncio.get_running_loop().call_soon(call.end, error)
    await asyncio.sleep(0)
    with pytest.raises(Unauthenticated) as caught:
        call.end_sending()
    assert caught.value is error


async def test_a_call_whose_message_is_never_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "SEND_TIMEOUT_S", 0.01)

    async def serve_call() -> None:
        call = Call("/a.B/C", Context(), streams=True)
        call.begin_sending()
        call.end(Unauthenticated("gone"))
        await asyncio.Event().wait()  # as gRPC waits for a client's window

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.create_task(serve_call()), 30)


async def test_a_caller_s_own_cancellation_stays_one() -> None:
    call = Call("/a.B/C", Context(), streams=False)
    with pytest.raises(asyncio.CancelledError), call.handled():
        raise asyncio.CancelledError


async def test_an_early_end_leaves_nothing_cancelled_behind() -> None:
    async def serve_call() -> str:
        call = Call("/a.B/C", Context(), streams=False)
        asyncio.get_running_loop().call_soon(call.end, Unauthenticated("gone"))
        try:
            with call.handled():
                await asyncio.Event().wait()
        except Unauthenticated:
            await asyncio.sleep(0)  # the status is sent here
            return "ended"
        return "went on"

    assert await asyncio.create_task(serve_call()) == "ended"
