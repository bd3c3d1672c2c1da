"""How calls of both clients end before their time: left, cancelled, closed, too late."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from chromarpc import AsyncClient, Cancelled, Client, DeadlineExceeded, Step
from tests.client.client_fake_server import PATIENCE_S, FakeServer, JobEvent, Request, Story, whole_job


def endless(server: FakeServer) -> Any:
    """A job that takes one step and then waits for its client to go away."""

    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        yield story.accepted(request)
        yield story.step(0, 1)
        yield from server.wait_for_end()

    return script


def test_breaking_out_of_the_loop_cancels(server: FakeServer, client: Client) -> None:
    server.script = endless(server)
    for event in client.generate("a"):
        if isinstance(event, Step):
            break
    del event
    gc.collect()
    assert server.ended.wait(PATIENCE_S)


def test_leaving_the_context_cancels(server: FakeServer, client: Client) -> None:
    server.script = endless(server)
    with client.generate("a") as stream:
        next(stream)
    assert server.ended.wait(PATIENCE_S)
    assert list(stream) == []


def test_cancel_from_another_thread(server: FakeServer, client: Client) -> None:
    server.script = endless(server)
    stream = client.generate("a")
    next(stream)
    next(stream)
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    with pytest.raises(Cancelled):
        next(stream)
    thread.join()
    assert server.ended.wait(PATIENCE_S)


async def test_cancelling_the_task_cancels_the_call(server: FakeServer, async_client: AsyncClient) -> None:
    server.script = endless(server)
    stepped = asyncio.Event()
    task = asyncio.create_task(
        async_client.generate_images("a", on_event=lambda e: stepped.set() if isinstance(e, Step) else None)
    )
    await asyncio.wait_for(stepped.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.ended.wait, PATIENCE_S)


async def test_breaking_out_of_the_loop_cancels_async(server: FakeServer, async_client: AsyncClient) -> None:
    server.script = endless(server)
    async for event in async_client.generate("a"):
        if isinstance(event, Step):
            break
    assert await asyncio.to_thread(server.ended.wait, PATIENCE_S)


async def test_leaving_the_context_cancels_async(server: FakeServer, async_client: AsyncClient) -> None:
    server.script = endless(server)
    async with async_client.generate("a") as stream:
        await anext(stream)
    assert await asyncio.to_thread(server.ended.wait, PATIENCE_S)


async def test_cancel_while_another_task_waits(server: FakeServer, async_client: AsyncClient) -> None:
    """The waiting task was not cancelled, so it must not see `asyncio.CancelledError`."""
    server.script = endless(server)
    stream = async_client.generate("a")
    await anext(stream)
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.cancel()
    with pytest.raises(Cancelled):
        await waiting


async def test_a_deadline_ends_the_call(server: FakeServer, client: Client, async_client: AsyncClient) -> None:
    server.script = endless(server)
    with pytest.raises(DeadlineExceeded):
        client.generate_images("a", timeout_s=0.3)
    assert server.ended.wait(PATIENCE_S)
    server.ended.clear()
    with pytest.raises(DeadlineExceeded):
        await async_client.generate_images("a", timeout_s=0.3)


def test_the_clients_own_deadline_is_for_calls_that_name_none(server: FakeServer) -> None:
    remaining = []

    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        remaining.append(context.time_remaining())
        return whole_job(request, context)

    server.script = script
    with Client(server.target) as client:
        client.generate_images("a")
    with Client(server.target, timeout_s=100) as client:
        client.generate_images("a")
        client.generate_images("a", timeout_s=50)
    assert remaining[0] is None or remaining[0] > 10**6
    assert 90 < remaining[1] <= 101
    assert 40 < remaining[2] <= 51


async def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = Client(server.target)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("a")
    async_client = AsyncClient(server.target)
    await async_client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await async_client.health()
