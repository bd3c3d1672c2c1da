"""Callers that go away and come back: a call that is made again under its id finds the job alive."""

from __future__ import annotations

import asyncio
import gc
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
from chromarpc.request import build_request
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


class ForgetfulProxy:
    """Passes on what the first client sends and nothing of what it is answered, until its connection is cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._is_first = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [near, far]
            # HTTP/2's own frames have to pass, or the client never sends its request.
            tells = _only_settings if self._is_first else _everything
            self._is_first = False
            for source, sink, passes in ((near, far, _everything), (far, near, tells)):
                threading.Thread(target=_pump, args=(source, sink, passes), daemon=True).start()

    def cut(self) -> None:
        """Cuts every connection."""
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for end in self._sockets:
            end.close()


def _everything(_kind: int) -> bool:
    return True


def _only_settings(kind: int) -> bool:
    return kind not in (0, 1)  # DATA, HEADERS


def _pump(source: socket.socket, sink: socket.socket, passes: Callable[[int], bool]) -> None:
    buffer = b""
    try:
        while data := source.recv(65536):
            if passes is _everything:
                sink.sendall(data)
                continue
            buffer += data
            while len(buffer) >= 9 and len(buffer) >= (size := 9 + int.from_bytes(buffer[:3], "big")):
                if passes(buffer[3]):
                    sink.sendall(buffer[:size])
                buffer = buffer[size:]
    except OSError:
        pass
    finally:
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def forgetful_proxy(port: int) -> Iterator[ForgetfulProxy]:
    proxy = ForgetfulProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


def _request(**changes: Any) -> generation_service_pb2.GenerateRequest:
    options = {**SMALL, "request_id": str(uuid.uuid4()), **changes}
    return build_request("a", **options)


def _jobs(client: chromarpc.Client) -> list[job_service_pb2.Job]:
    return list(client.list_jobs())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def _job_under(client: chromarpc.Client, request_id: str) -> job_service_pb2.Job:
    return next(job for job in client.list_jobs() if job.request_id == request_id)


def _in_engine(server: RunningServer, job_id: str) -> Job | None:
    """The job, while it has not ended."""
    assert server.app._engine is not None
    return server.app._engine.jobs._jobs.get(job_id)


def _attached(server: RunningServer, job_id: str) -> int:
    job = _in_engine(server, job_id)
    return 0 if job is None else job.attached


def _is_away(server: RunningServer, job_id: str) -> bool:
    job = _in_engine(server, job_id)
    return job is not None and job.absence is not None


def _until_cancelled(client: chromarpc.Client, job_id: str) -> None:
    """Without watching it, which would keep it alive."""
    _until(lambda: client.get_job(job_id).state == State.JOB_STATE_CANCELLED)


def _send_and_cut(server: RunningServer, request: generation_service_pb2.GenerateRequest) -> str:
    """Makes a call whose connection is cut before anything was answered. Returns its job's id."""
    with forgetful_proxy(server.port) as proxy, chromarpc.Client(server.target) as beside:
        with grpc.insecure_channel(f"127.0.0.1:{proxy.port}", [("grpc.enable_retries", 0)]) as channel:
            call = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=60)
            _until(lambda: any(job.request_id == request.request_id for job in _jobs(beside)))
            job_id = _job_under(beside, request.request_id).job_id
            _until(lambda: _attached(server, job_id) == 1)
            proxy.cut()
            with pytest.raises(grpc.RpcError):
                next(call)
        _until(lambda: _attached(server, job_id) == 0)
        return job_id


def test_a_call_that_is_made_again_after_a_cut_gets_its_job_alive(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **LONG)  # so that the job has not ended meanwhile
        request = _request()
        job_id = _send_and_cut(server, request)
        told: list[str] = []
        try:
            for event in client.generate_request(request):
                told.append(type(event).__name__)
                if isinstance(event, chromarpc.Accepted):
                    assert event.job_id == job_id
                    client.cancel_job(blocker.job_id)
        except chromarpc.StatusError as error:
            told.append(f"{error.reason}: {error.message}")
    assert told[-1] == "Completed"


def test_who_comes_back_by_watching_keeps_the_job_while_it_watches(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **LONG)
        job_id = _send_and_cut(server, _request())
        assert _is_away(server, job_id)
        with client.watch_job(job_id) as watcher:
            next(watcher)
            assert not _is_away(server, job_id)
        _until(lambda: _is_away(server, job_id))
        watcher = client.watch_job(job_id)
        next(watcher)
        client.cancel_job(blocker.job_id)
        assert isinstance(list(watcher)[-1], chromarpc.Completed)


def test_a_job_nobody_comes_back_to_is_cancelled_and_its_request_runs_anew(serve: Serve) -> None:
    server = serve(reattach_s=0.2)
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **LONG)
        request = _request()
        job_id = _send_and_cut(server, request)
        _until_cancelled(client, job_id)
        with pytest.raises(chromarpc.Cancelled, match=r"did not come back within 0\.2 s"):
            list(client.watch_job(job_id))
        client.cancel_job(blocker.job_id)
        again = list(client.generate_request(request))
        assert again[0].job_id != job_id  # type: ignore[union-attr]
        assert isinstance(again[-1], chromarpc.Completed)
        # And from then on the request finds the job that it was run by.
        assert next(client.generate_request(request)).job_id == again[0].job_id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("policy", "has_id"),
    [
        (generation_service_pb2.DISCONNECT_POLICY_CANCEL, True),
        (generation_service_pb2.DISCONNECT_POLICY_UNSPECIFIED, False),
    ],
)
def test_others_are_cancelled_at_once(serve: Serve, policy: Any, has_id: bool) -> None:
    server = serve()
    request = _request(**LONG)
    request.on_disconnect = policy
    if not has_id:
        request.ClearField("request_id")
    with grpc.insecure_channel(server.target) as channel, chromarpc.Client(server.target) as client:
        call = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=60)
        job_id = next(call).event.accepted.job_id
        call.cancel()
        _until_cancelled(client, job_id)


def test_a_deadline_passes_also_while_the_caller_is_away(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        blocker = client.create_job("a", **LONG)
        call = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(_request(), timeout=2.0)
        job_id = next(call).event.accepted.job_id
        call.cancel()
        _until_cancelled(client, job_id)
        with pytest.raises(chromarpc.Cancelled, match="the deadline passed"):
            list(client.watch_job(job_id))
        client.cancel_job(blocker.job_id)


def test_a_job_that_waits_for_its_caller_lets_others_go_first(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        blocker = client.create_job("a", **LONG)
        request = _request()
        away = _send_and_cut(server, request)
        later = client.create_job("b", **SMALL)
        client.cancel_job(blocker.job_id)
        list(client.watch_job(later.job_id))
        back = list(client.generate_request(request))
        assert isinstance(back[-1], chromarpc.Completed)
        ended = {job.job_id: job.end_time.ToNanoseconds() for job in client.list_jobs()}
        assert ended[later.job_id] < ended[away]


# Users who leave. The server cannot tell, so their clients do: with a day to wait for, only a cancel ends the job.


def _leave_by_closing(client: chromarpc.Client, request: generation_service_pb2.GenerateRequest) -> None:
    with client.generate_request(request) as stream:
        next(stream)


def _leave_by_breaking(client: chromarpc.Client, request: generation_service_pb2.GenerateRequest) -> None:
    for _ in client.generate_request(request):
        break
    gc.collect()


def _leave_by_interrupt(client: chromarpc.Client, request: generation_service_pb2.GenerateRequest) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    stream = client.generate_request(request)
    next(stream)
    stream._reader.read = interrupted  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        next(stream)


def _leave_by_closing_the_client(
    client: chromarpc.Client, request: generation_service_pb2.GenerateRequest
) -> None:
    stream = client.generate_request(request)
    next(stream)
    client.close()
    with pytest.raises(chromarpc.Cancelled):
        list(stream)


def _leave_by_cancel(client: chromarpc.Client, request: generation_service_pb2.GenerateRequest) -> None:
    stream = client.generate_request(request)
    next(stream)
    stream.cancel()


def _leave_before_the_answer(client: chromarpc.Client, request: generation_service_pb2.GenerateRequest) -> None:
    with client.generate_request(request), chromarpc.Client(client._connection.target) as beside:
        _until(lambda: any(job.request_id == request.request_id for job in _jobs(beside)))


@pytest.mark.parametrize(
    "leave",
    [
        _leave_by_closing,
        _leave_by_breaking,
        _leave_by_interrupt,
        _leave_by_closing_the_client,
        _leave_by_cancel,
        _leave_before_the_answer,
    ],
)
def test_a_user_who_leaves_ends_the_job_at_once(serve: Serve, leave: Callable[..., None]) -> None:
    server = serve(reattach_s=86_400)
    request = _request(**LONG)
    with chromarpc.Client(server.target) as client, chromarpc.Client(server.target) as other:
        leave(client, request)
        _until_cancelled(other, _job_under(other, request.request_id).job_id)


def test_a_user_of_the_async_client_who_leaves_ends_the_job_at_once(serve: Serve) -> None:
    server = serve(reattach_s=86_400)
    requests = [_request(**LONG) for _ in range(4)]

    async def go() -> None:
        async with chromarpc.AsyncClient(server.target) as client:
            async with client.generate_request(requests[0]) as stream:
                await anext(stream)
            async for _ in client.generate_request(requests[1]):
                break

            async def follow() -> None:
                async for event in client.generate_request(requests[2]):
                    if isinstance(event, chromarpc.Accepted):
                        accepted.set()

            accepted = asyncio.Event()
            task = asyncio.create_task(follow())
            await accepted.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await anext(client.generate_request(requests[3]))

    asyncio.run(go())
    with chromarpc.Client(server.target) as client:
        for request in requests:
            _until_cancelled(client, _job_under(client, request.request_id).job_id)


def test_one_of_two_callers_who_leaves_leaves_the_job_to_the_other(serve: Serve) -> None:
    server = serve(reattach_s=86_400)
    request = _request(**{**LONG, "sample_steps": 20})
    with chromarpc.Client(server.target) as client:
        first, second = client.generate_request(request), client.generate_request(request)
        next(first), next(second)
        first.close()
        assert isinstance(list(second)[-1], chromarpc.Completed)


def test_a_job_is_cancelled_under_its_request_id_and_under_one_name_only(serve: Serve) -> None:
    server = serve()
    request_id = str(uuid.uuid4())
    with chromarpc.Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        job = client.create_job("a", request_id=request_id, **LONG)
        cancel = job_service_pb2_grpc.JobServiceStub(channel).CancelJob
        for wrong, field in (
            ({"request_id": request_id, "job_id": job.job_id}, "request_id"),
            ({}, "job_id"),
            ({"request_id": str(uuid.uuid4())}, "request_id"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                cancel(job_service_pb2.CancelJobRequest(**wrong), timeout=10)
            told = chromarpc.errors.from_status(
                refused.value.code(), refused.value.details(), refused.value.trailing_metadata(), target=""
            )
            assert [violation.field for violation in told.violations] == [field]
        answer = cancel(job_service_pb2.CancelJobRequest(request_id=request_id), timeout=10)
        assert answer.job.job_id == job.job_id
        with pytest.raises(chromarpc.Cancelled):
            list(client.watch_job(job.job_id))
