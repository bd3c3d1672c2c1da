"""Jobs that outlive their callers: made once, watched by many, found again, stopped, forgotten."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
)
from chromarpc_server.jobs.job import Job
from tests.conftest import RunningServer
from tests.integration.test_generate import SMALL

Serve = Callable[..., RunningServer]
LONG: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "sample_steps": 150}
State = job_service_pb2.JobState


def _reason(error: pytest.ExceptionInfo[chromarpc.StatusError]) -> str | None:
    return error.value.reason


def _until_end(client: chromarpc.Client, job_id: str) -> list[Any]:
    return list(client.watch_job(job_id))


def _kinds(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_a_job_is_made_watched_and_its_picture_fetched_again(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a red circle", seed=5, **SMALL)
        assert job.state in (State.JOB_STATE_QUEUED, State.JOB_STATE_RUNNING)
        assert job.total_steps == 3
        events = _until_end(client, job.job_id)
        again = _until_end(client, job.job_id)
        (direct,) = client.generate_images("a red circle", seed=5, **SMALL)
        done = client.get_job(job.job_id)
        data = client.get_image_bytes(job.job_id)
    assert _kinds(events)[0] == "Accepted"
    assert _kinds(events)[-1] == "Completed"
    assert [event.sequence for event in events] == [event.sequence for event in again]
    assert hashlib.sha256(data).hexdigest() == direct.sha256 == done.images[0].sha256
    assert done.state == State.JOB_STATE_SUCCEEDED
    assert (done.done_steps, done.total_steps, done.attempt_count) == (3, 3, 1)
    assert done.create_time.ToDatetime() <= done.start_time.ToDatetime() <= done.end_time.ToDatetime()
    assert done.expire_time.ToDatetime() > done.end_time.ToDatetime()


def test_watching_from_a_sequence_gives_the_rest_and_bytes_can_be_left_out(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        job = client.create_job("a", **SMALL)
        whole = [event.sequence for event in _until_end(client, job.job_id)]
        stub = job_service_pb2_grpc.JobServiceStub(channel)

        def watch(**fields: Any) -> list[Any]:
            request = job_service_pb2.WatchJobRequest(job_id=job.job_id, **fields)
            return [response.event for response in stub.WatchJob(request, timeout=20)]

        everything, rest = watch(), watch(after_sequence=whole[2])
        assert [event.sequence for event in rest] == [e.sequence for e in everything if e.sequence > whole[2]]
        kinds = [event.WhichOneof("event") for event in watch(omit_image_bytes=True)]
        assert "image_header" in kinds
        assert "image_chunk" not in kinds
        assert watch(after_sequence=everything[-1].sequence) == []
        with pytest.raises(grpc.RpcError) as error:
            watch(after_sequence=everything[-1].sequence + 1)
        told = chromarpc.errors.from_status(
            error.value.code(), error.value.details(), error.value.trailing_metadata(), target=server.target
        )
        assert [violation.field for violation in told.violations] == ["after_sequence"]


def test_many_watch_one_job_and_all_see_everything(server: RunningServer) -> None:
    async def go() -> list[list[int]]:
        async with chromarpc.AsyncClient(server.target) as client:
            job = await client.create_job("a", **{**SMALL, "sample_steps": 8})

            async def watch() -> list[int]:
                return [event.sequence async for event in client.watch_job(job.job_id)]

            return await asyncio.gather(*(watch() for _ in range(12)))

    seen = asyncio.run(go())
    assert all(one == seen[0] for one in seen)


def test_the_same_request_id_makes_one_job_and_another_request_under_it_is_refused(server: RunningServer) -> None:
    async def go() -> set[str]:
        async with chromarpc.AsyncClient(server.target) as client:
            request_id = str(uuid.uuid4())
            jobs = await asyncio.gather(
                *(client.create_job("a", request_id=request_id, **SMALL) for _ in range(5))
            )
            with pytest.raises(chromarpc.StatusError) as error:
                await client.create_job("b", request_id=request_id, **SMALL)
            assert _reason(error) == "REQUEST_ID_REUSED"
            assert error.value.code is grpc.StatusCode.ALREADY_EXISTS
            events = [event async for event in client.generate("a", request_id=request_id, **SMALL)]
            return {job.job_id for job in jobs} | {events[0].job_id}  # type: ignore[union-attr]

    assert len(asyncio.run(go())) == 1


def test_a_secret_makes_no_other_request_of_it(server: RunningServer) -> None:
    request_id = str(uuid.uuid4())
    with chromarpc.Client(server.target) as client:
        one = client.create_job("a", request_id=request_id, **SMALL)
        other = client.create_job("a", request_id=request_id, hf_token="hf_secret", **SMALL)
    assert one.job_id == other.job_id


def test_a_caller_that_goes_away_ends_its_job_unless_it_said_otherwise(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        with client.generate("a", **LONG) as events:
            mine = next(events).job_id  # type: ignore[union-attr]
        with client.generate("a", detach=True, **SMALL) as events:
            detached = next(events).job_id  # type: ignore[union-attr]
        with pytest.raises(chromarpc.Cancelled):
            _until_end(client, mine)
        assert client.get_job(mine).state == State.JOB_STATE_CANCELLED
        assert _kinds(_until_end(client, detached))[-1] == "Completed"


def test_who_else_is_attached_keeps_a_job_alive(serve: Serve) -> None:
    server = serve()
    request_id = str(uuid.uuid4())
    options = {**SMALL, "sample_steps": 60}
    with chromarpc.Client(server.target) as client:
        first = client.generate("a", request_id=request_id, **options)
        next(first)
        second = client.generate("a", request_id=request_id, **options)
        next(second)
        first.close()
        assert _kinds(list(second))[-1] == "Completed"


def test_the_deadline_of_one_caller_does_not_end_the_job_of_another(serve: Serve) -> None:
    server = serve()
    request = generation_service_pb2.GenerateRequest(model="chroma-mini", request_id=str(uuid.uuid4()))
    request.prompts.add(prompt="a", width=512, height=512, sample_steps=100)
    with grpc.insecure_channel(server.target) as channel, chromarpc.Client(server.target) as client:
        client.generate_images("warm", **SMALL)
        generate = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate
        hasty = generate(request, timeout=1.5)
        next(hasty)
        patient = generate(request, timeout=120)
        next(patient)
        with pytest.raises(grpc.RpcError) as error:
            list(hasty)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert list(patient)[-1].event.WhichOneof("event") == "completed"


def test_a_job_that_was_made_again_to_outlive_its_caller_does(serve: Serve) -> None:
    server = serve()
    request_id = str(uuid.uuid4())
    with chromarpc.Client(server.target) as client:
        with client.generate("a", request_id=request_id, **LONG) as events:
            attached = next(events).job_id  # type: ignore[union-attr]
            assert client.create_job("a", request_id=request_id, **LONG).job_id == attached
        stopped = server.stop()
        assert stopped == 0
    server = serve()
    with chromarpc.Client(server.target) as client:
        found = client.get_job(attached)
        assert found.state in (State.JOB_STATE_QUEUED, State.JOB_STATE_RUNNING)
        # Nobody came back to it, and nobody has to.
        (job,) = server.app._engine.jobs._jobs.values()  # type: ignore[union-attr]
        assert job.absence is None
        client.cancel_job(attached)


def test_what_a_job_weighs_is_let_go_although_it_might_have_waited_longer(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a", max_queue_s=3600.0, **SMALL)
        assert _kinds(_until_end(client, job.job_id))[-1] == "Completed"
    deadline = time.monotonic() + 20
    while True:
        gc.collect()
        held = [found for found in gc.get_objects() if type(found) is Job and found.id == job.job_id]
        if not held:
            break
        assert time.monotonic() < deadline
        del held


def test_cancelling_ends_one_job_and_its_watchers_see_it(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        running, waiting, last = (client.create_job("a", **LONG) for _ in range(3))
        watcher = client.watch_job(running.job_id)
        while not isinstance(next(watcher), chromarpc.Step):
            pass
        assert client.get_job(last.job_id).queue_position == 2
        client.cancel_job(waiting.job_id)
        assert client.get_job(waiting.job_id).state == State.JOB_STATE_CANCELLED
        assert client.get_job(running.job_id).state == State.JOB_STATE_RUNNING
        assert client.get_job(last.job_id).queue_position == 1
        client.cancel_job(running.job_id)
        with pytest.raises(chromarpc.Cancelled):
            list(watcher)
        client.cancel_job(running.job_id)  # does nothing
        client.cancel_job(last.job_id)
        with pytest.raises(chromarpc.Cancelled):
            _until_end(client, last.job_id)
        states = [job.state for job in client.list_jobs()]
    assert states == [State.JOB_STATE_CANCELLED] * 3


def test_jobs_are_listed_newest_first_in_pages_and_by_state(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        made = [client.create_job("a", **{**SMALL, "sample_steps": 1}).job_id for _ in range(5)]
        for job_id in made:
            _until_end(client, job_id)
        assert [job.job_id for job in client.list_jobs()] == made[::-1]
        assert client.list_jobs(states=[State.JOB_STATE_FAILED]) == ()
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        pages, token = [], ""
        while True:
            answer = stub.ListJobs(job_service_pb2.ListJobsRequest(page_size=2, page_token=token), timeout=10)
            pages.append([job.job_id for job in answer.jobs])
            token = answer.next_page_token
            if not token:
                break
        assert pages == [made[:2:-1], made[2:0:-1], made[:1]]
        client.delete_job(made[0])
        with pytest.raises(chromarpc.NotFound) as error:
            client.get_job(made[0])
        assert _reason(error) == "JOB_NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "request_message", "reason", "field"),
    [
        ("GetJob", job_service_pb2.GetJobRequest(), "INVALID_PARAMETER", "job_id"),
        ("GetJob", job_service_pb2.GetJobRequest(job_id="x"), "JOB_NOT_FOUND", "job_id"),
        ("CancelJob", job_service_pb2.CancelJobRequest(job_id="x"), "JOB_NOT_FOUND", "job_id"),
        ("DeleteJob", job_service_pb2.DeleteJobRequest(job_id="x"), "JOB_NOT_FOUND", "job_id"),
        ("ListJobs", job_service_pb2.ListJobsRequest(page_size=-1), "INVALID_PARAMETER", "page_size"),
        ("ListJobs", job_service_pb2.ListJobsRequest(page_token="?"), "INVALID_PARAMETER", "page_token"),
        ("ListJobs", job_service_pb2.ListJobsRequest(page_token="e30="), "INVALID_PARAMETER", "page_token"),
    ],
)
def test_bad_calls_are_refused_by_name(
    server: RunningServer, method: str, request_message: Any, reason: str, field: str
) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            getattr(stub, method)(request_message, timeout=10)
        told = chromarpc.errors.from_status(
            error.value.code(), error.value.details(), error.value.trailing_metadata(), target=server.target
        )
    assert told.reason == reason
    assert [violation.field for violation in told.violations] == [field]


@pytest.mark.parametrize(
    ("options", "field"),
    [({"request_id": "not a uuid"}, "request_id"), ({"max_queue_s": 0.0}, "max_queue_time")],
)
def test_bad_delivery_is_refused_by_field(server: RunningServer, options: dict[str, Any], field: str) -> None:
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.InvalidRequest) as error:
        client.create_job("a", **options, **SMALL)
    assert [violation.field for violation in error.value.violations] == [field]


def test_images_that_are_not_there_are_named(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a", **LONG)
        with pytest.raises(chromarpc.NotFound, match="no image of prompt 0 yet") as error:
            client.get_image_bytes(job.job_id)
        assert _reason(error) == "IMAGE_NOT_FOUND"
        with pytest.raises(chromarpc.StatusError) as refused:
            client.delete_job(job.job_id)
        assert _reason(refused) == "JOB_NOT_ENDED"
        client.cancel_job(job.job_id)


def test_a_job_that_waits_too_long_fails_by_name(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        first = client.create_job("a", **LONG)
        late = client.create_job("a", max_queue_s=0.05, **SMALL)
        with pytest.raises(chromarpc.StatusError) as error:
            _until_end(client, late.job_id)
        assert _reason(error) == "QUEUE_TIME_EXCEEDED"
        assert client.get_job(late.job_id).failure.reason == "QUEUE_TIME_EXCEEDED"
        client.cancel_job(first.job_id)


def test_ended_jobs_go_when_their_pictures_are_too_much(serve: Serve) -> None:
    server = serve(job_keep_bytes=30_000)
    with chromarpc.Client(server.target) as client:
        made = []
        for seed in range(8):
            made.append(client.create_job("a", seed=seed, **SMALL).job_id)
            _until_end(client, made[-1])
        kept = [job.job_id for job in client.list_jobs()]
        weight = sum(image.size_bytes for job in client.list_jobs() for image in job.images)
    assert kept == made[::-1][: len(kept)]
    assert 0 < len(kept) < 8
    assert weight <= 30_000


@contextmanager
def _proxy(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """A TCP proxy to a local port, and a function that cuts every connection through it."""
    listener = socket.create_server(("127.0.0.1", 0))
    pairs: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", port))
            pairs.extend((near, far))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    def cut() -> None:
        for end in pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], cut
    finally:
        listener.close()
        cut()
        for end in pairs:
            end.close()


def test_a_lost_connection_is_taken_up_again_without_a_gap(serve: Serve) -> None:
    server = serve()
    options = {**SMALL, "sample_steps": 60, "preview_every": 20}
    with _proxy(server.port) as (port, cut), chromarpc.Client(f"127.0.0.1:{port}") as client:
        events: list[Any] = []
        with client.generate("a", detach=True, **options) as stream:
            for event in stream:
                events.append(event)
                if isinstance(event, chromarpc.Step) and event.step in (5, 30):
                    cut()
    steps = [event.step for event in events if isinstance(event, chromarpc.Step)]
    assert steps == list(range(1, 61))
    assert _kinds(events)[-2:] == ["ImageReady", "Completed"]
    assert _kinds(events).count("Accepted") == 1


def test_the_async_client_takes_a_lost_connection_up_again_too(serve: Serve) -> None:
    server = serve()

    async def go(port: int, cut: Callable[[], None]) -> list[Any]:
        events = []
        async with chromarpc.AsyncClient(f"127.0.0.1:{port}") as client:
            job = await client.create_job("a", **{**SMALL, "sample_steps": 60})
            async for event in client.watch_job(job.job_id):
                events.append(event)
                if isinstance(event, chromarpc.Step) and event.step == 10:
                    cut()
            assert len(await client.list_jobs()) == 1
            data = await client.get_image_bytes(job.job_id)
            assert hashlib.sha256(data).hexdigest() == (await client.get_job(job.job_id)).images[0].sha256
            await client.delete_job(job.job_id)
        return events

    with _proxy(server.port) as (port, cut):
        events = asyncio.run(go(port, cut))
    assert [event.step for event in events if isinstance(event, chromarpc.Step)] == list(range(1, 61))
