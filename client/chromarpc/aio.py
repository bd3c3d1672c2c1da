"""The asyncio client: the same calls and events as `chromarpc.client`, awaited."""

from __future__ import annotations

import asyncio
import os
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chromarpc.channel import DEFAULT_TARGET, DEFAULT_UNARY_TIMEOUT_S, TlsOptions, connection
from chromarpc.errors import Cancelled, NotFound, ServerUnavailable, StatusError, from_status
from chromarpc.events import Event, ImageReady
from chromarpc.health import HealthStatus, health_status
from chromarpc.images import GeneratedImage
from chromarpc.jobs import MOST_TRIES, PAGE_SIZE, ImageCollector, JobMessage, wait_s
from chromarpc.leaving import LEAVE_WAIT_S, leave_request, must_be_told
from chromarpc.loras import (
    INSPECT_TIMEOUT_S,
    LoraInspection,
    LoraList,
    StoredLora,
    list_request,
    lora_inspection,
    lora_list,
)
from chromarpc.request import GenerateOptions, PromptLike, build_request
from chromarpc.stream import StreamReader
from chromarpc.upload import Call, Uploaded, UploadProgress, Wait, advance, open_file, upload_steps
from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    lora_service_pb2,
    lora_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncEventStream(AsyncIterator[Event]):
    """The events of one generation, in order; the call is already on its way.

    Leaving it before the end (`async with`, `aclose()`, cancelling the task that waits, or dropping the last
    reference) cancels the call, and the server stops within one step. A job that was made with `detach` goes on.
    """

    def __init__(
        self,
        call: Any,
        target: str,
        resume: Callable[[str, int], Any] | None = None,
        leave: Callable[[str | None], asyncio.Future[None]] | None = None,
    ) -> None:
        """Reads a call.

        Args:
            call: the call.
            target: named where it cannot be reached.
            resume: watches a job from the event after a sequence, where the job outlives a lost connection.
            leave: tells the server that a job is not wanted any more, where cancelling the call does not; is
                given the job's id once that is known.
        """
        self._call = call
        self._leave = leave
        self._told: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop() if leave is not None else None
        self._target = target
        self._resume = resume
        self._tries = 0
        self._reader = StreamReader()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Waits for the next event.

        Raises:
            StopAsyncIteration: after `Completed`.
            StatusError: the call ended with an error; see `chromarpc.errors`.
            ProtocolError: the stream broke its contract; the call was cancelled.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            while True:
                event = await self._next_event()
                if event is not None:
                    return event
        except (StatusError, StopAsyncIteration):
            self._over = True  # and not left: where the connection was lost, the call may be made again
            self._call.cancel()
            raise
        except BaseException:
            self.close()
            raise

    async def _next_event(self) -> Event | None:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            error = self._reader.ending or _error_of(failure, self._target)
            if not await self._come_back(error):
                raise error from None
            return None
        except asyncio.CancelledError:
            # grpc answers a read after `cancel()` as if the task itself were cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Cancelled("cancelled by this side", code=grpc.StatusCode.CANCELLED) from None
        if isinstance(response, JobMessage):
            self._tries = 0
            return self._reader.read(response)
        self._reader.finish()  # grpc.aio.EOF
        raise StopAsyncIteration

    async def _come_back(self, error: StatusError) -> bool:
        """Takes a lost connection up again after the last event that came. Whether it makes sense."""
        job_id = self._reader.job_id
        lost = isinstance(error, ServerUnavailable) and self._reader.ending is None
        if self._resume is None or job_id is None or not lost or self._tries >= MOST_TRIES or self._over:
            return False
        await asyncio.sleep(wait_s(self._tries))
        self._tries += 1
        self._call = self._resume(job_id, self._reader.sequence)
        return True

    def cancel(self) -> None:
        """Cancels the call; whoever waits for an event gets `Cancelled`."""
        is_over, leave = self._over, self._leave
        self._leave = None  # once is enough
        self._call.cancel()
        if leave is not None and not is_over:
            self._told = leave(self._reader.job_id)

    def close(self) -> None:
        """Ends the iteration, cancelling the call if it still runs."""
        self.cancel()
        self._over = True

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`; returns once the server knows, where it has to be told."""
        self.close()
        if self._told is not None:
            await asyncio.wait([self._told], timeout=LEAVE_WAIT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The call is part of a reference cycle, so that without this it would run on until a collection.
        if self._call.done():
            return
        if self._leave is not None and self._loop is not _running_loop():
            self._leave = None  # nobody could make the call
        self.cancel()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class AsyncClient:
    """Speaks to one server from one event loop.

    Opens its channel with the first call. Close it after use, or use it as a context manager.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: TlsOptions | bool = False,
        timeout_s: float | None = None,
        allow_insecure_token: bool = False,
    ) -> None:
        """Checks the arguments, which are those of `Client`; connects to nothing yet.

        Raises:
            ValueError: a token that may not be sent, or half of a client certificate.
            OSError: a TLS file cannot be read.
        """
        self._connection = connection(target, token=token, tls=tls, allow_insecure_token=allow_insecure_token)
        self._timeout_s = timeout_s
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._streams: weakref.WeakSet[AsyncEventStream] = weakref.WeakSet()
        """Those whose jobs wait for their caller when the connection is gone."""
        self._leaving: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"AsyncClient({self._connection.target!r})"

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncEventStream:
        """Starts a generation and returns its events; one image for each prompt.

        Args:
            prompts: one, or several; a text or a `Prompt`.
            timeout_s: deadline of the whole generation.
            options: see `GenerateOptions`.

        Raises:
            InvalidRequest: an argument that no request can hold. What the server refuses is raised by the
                iteration instead, like every other error.
        """
        return self.generate_request(build_request(prompts, **options), timeout_s=timeout_s)

    def generate_request(
        self, request: generation_service_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncEventStream:
        """The same for a ready message, such as `parse_request_json` gives."""
        stub = generation_service_pb2_grpc.GenerationServiceStub(self._open_channel())
        call = stub.Generate(request, timeout=self._deadline_s(timeout_s), metadata=self._connection.metadata)
        outlives = request.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_DETACH
        resume = self._watch if outlives else None
        if not must_be_told(request):
            return AsyncEventStream(call, self._connection.target, resume)
        stream = AsyncEventStream(call, self._connection.target, resume, partial(self._leave, request.request_id))
        self._streams.add(stream)
        return stream

    def _leave(self, request_id: str, job_id: str | None) -> asyncio.Future[None]:
        told = asyncio.ensure_future(self._tell(leave_request(request_id, job_id)))
        self._leaving.add(told)
        told.add_done_callback(self._leaving.discard)
        return told

    async def _tell(self, request: job_service_pb2.CancelJobRequest) -> None:
        if self._channel is not None:
            stub = job_service_pb2_grpc.JobServiceStub(self._channel)
            with suppress(grpc.aio.AioRpcError):
                await stub.CancelJob(request, timeout=LEAVE_WAIT_S, metadata=self._connection.metadata)

    async def create_job(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> job_service_pb2.Job:
        """Queues a generation that outlives this client; `watch_job` follows it.

        A `request_id` is drawn where none is given, so that an answer that was lost can be asked for again.

        Args:
            prompts: one, or several; a text or a `Prompt`.
            timeout_s: deadline of the call, not of the job.
            options: see `GenerateOptions`.

        Raises:
            InvalidRequest: an argument that no request can hold, or that the server refuses.
            StatusError: see `chromarpc.errors`.
        """
        return await self.create_job_request(build_request(prompts, **options), timeout_s=timeout_s)

    async def create_job_request(
        self, request: generation_service_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> job_service_pb2.Job:
        """The same for a ready message, such as `parse_request_json` gives."""
        sent = generation_service_pb2.GenerateRequest()
        sent.CopyFrom(request)
        if not sent.HasField("request_id"):
            sent.request_id = str(uuid.uuid4())
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        response = await self._ask(stub.CreateJob, job_service_pb2.CreateJobRequest(request=sent), timeout_s)
        return response.job

    def watch_job(self, job_id: str, *, timeout_s: float | None = None) -> AsyncEventStream:
        """A job's events from the first on, also after it ended. Leaving early does nothing to the job.

        A lost connection is taken up again after the last event that came.

        Args:
            job_id: as `Accepted.job_id` has it.
            timeout_s: deadline of each connection.

        Raises:
            What the server refuses is raised by the iteration: `NotFound` where there is no such job.
        """
        call = self._watch(job_id, 0, timeout_s)
        return AsyncEventStream(call, self._connection.target, self._watch)

    def _watch(self, job_id: str, after_sequence: int, timeout_s: float | None = None) -> Any:
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        request = job_service_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
        return stub.WatchJob(request, timeout=self._deadline_s(timeout_s), metadata=self._connection.metadata)

    async def get_job(self, job_id: str, *, timeout_s: float | None = None) -> job_service_pb2.Job:
        """How a job is.

        Raises:
            NotFound: there is no such job, or it was forgotten.
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        response = await self._ask(stub.GetJob, job_service_pb2.GetJobRequest(job_id=job_id), timeout_s)
        return response.job

    async def list_jobs(
        self, *, states: Sequence[job_service_pb2.JobState.ValueType] = (), timeout_s: float | None = None
    ) -> tuple[job_service_pb2.Job, ...]:
        """The caller's jobs, newest first.

        Args:
            states: only jobs in one of them; all where empty.
            timeout_s: deadline of each of its calls, one for 1000 jobs.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        jobs: list[job_service_pb2.Job] = []
        token = ""
        while True:
            request = job_service_pb2.ListJobsRequest(page_size=PAGE_SIZE, page_token=token, states=states)
            page = await self._ask(stub.ListJobs, request, timeout_s)
            jobs += page.jobs
            token = page.next_page_token
            if not token:
                return tuple(jobs)

    async def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> job_service_pb2.Job:
        """Stops a job: at once while it waits, within one step while it runs.

        Raises:
            NotFound: there is no such job.
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        response = await self._ask(stub.CancelJob, job_service_pb2.CancelJobRequest(job_id=job_id), timeout_s)
        return response.job

    async def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Has the server forget a job that ended, and its pictures.

        Raises:
            NotFound: there is no such job.
            StatusError: see `chromarpc.errors`; `FAILED_PRECONDITION` while the job has not ended.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        await self._ask(stub.DeleteJob, job_service_pb2.DeleteJobRequest(job_id=job_id), timeout_s)

    async def get_image_bytes(
        self, job_id: str, prompt_index: int = 0, *, timeout_s: float | None = None
    ) -> bytes:
        """One of a job's pictures again: the encoded file, checked against its SHA-256.

        Raises:
            NotFound: there is no such job, or it has no such picture yet.
            ProtocolError: the bytes are not those that were announced.
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        request = job_service_pb2.GetImageRequest(job_id=job_id, prompt_index=prompt_index)
        call: Any = stub.GetImage(request, timeout=self._deadline_s(timeout_s), metadata=self._connection.metadata)
        collected = ImageCollector()
        try:
            async for response in call:
                collected.take(response)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self._connection.target) from None
        finally:
            call.cancel()
        return collected.finish()[1]

    async def generate_images(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[GeneratedImage]:
        """Runs a generation to its end and returns its images in the order of the prompts.

        Args:
            prompts: one, or several; a text or a `Prompt`.
            timeout_s: deadline of the whole generation.
            on_event: called with every event as it comes, for progress.
            options: see `GenerateOptions`.

        Raises:
            ChromarpcError: see `chromarpc.errors`; images that were ready before it are lost.
        """
        images = []
        async with self.generate(prompts, timeout_s=timeout_s, **options) as stream:
            async for event in stream:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, ImageReady):
                    images.append(event.image)
        return sorted(images, key=lambda image: image.prompt_index)

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[model_service_pb2.Model, ...]:
        """The models that requests can name, in the server's order.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = model_service_pb2_grpc.ModelServiceStub(self._open_channel())
        response = await self._ask(stub.ListModels, model_service_pb2.ListModelsRequest(), timeout_s)
        return tuple(response.models)

    async def server_info(self, *, timeout_s: float | None = None) -> model_service_pb2.GetServerInfoResponse:
        """Version, device, numerics profiles, limits and queue of the server.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = model_service_pb2_grpc.ModelServiceStub(self._open_channel())
        return await self._ask(stub.GetServerInfo, model_service_pb2.GetServerInfoRequest(), timeout_s)

    async def list_loras(self, *, timeout_s: float | None = None) -> LoraList:
        """The adapters that requests can name.

        Args:
            timeout_s: deadline of each of its calls, one for 1000 adapters.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = lora_service_pb2_grpc.LoraServiceStub(self._open_channel())
        pages: list[lora_service_pb2.ListLorasResponse] = []
        request = list_request(None)
        while request is not None:
            pages.append(await self._ask(stub.ListLoras, request, timeout_s))
            request = list_request(pages[-1])
        return lora_list(pages)

    async def inspect_lora(
        self,
        path: str,
        *,
        model: str | None = None,
        hf_token: str | None = None,
        timeout_s: float | None = None,
    ) -> LoraInspection:
        """What an adapter is, and how strongly it changes a model.

        Args:
            path: as `StoredLora.path` and requests have it; a URL is fetched first.
            model: the model it is for, whose weights the server must have; `chroma` when left out.
            hf_token: for a Hugging Face URL that needs one.
            timeout_s: deadline, 120 s where nobody says.

        Raises:
            LoraNotFound: there is no such adapter.
            LoraInvalid, LoraIncompatible: it cannot be used.
            StatusError: see `chromarpc.errors`.
        """
        stub = lora_service_pb2_grpc.LoraServiceStub(self._open_channel())
        request = lora_service_pb2.InspectLoraRequest(path=path, model=model, hf_token=hf_token)
        deadline_s = self._deadline_s(timeout_s)
        response = await self._ask(
            stub.InspectLora, request, INSPECT_TIMEOUT_S if deadline_s is None else deadline_s
        )
        return lora_inspection(response.inspection)

    async def upload_lora(
        self,
        path: str | os.PathLike[str] | BufferedReader,
        *,
        filename: str | None = None,
        progress: UploadProgress | None = None,
        timeout_s: float | None = None,
    ) -> StoredLora:
        """Uploads an adapter file, unless its bytes were uploaded before.

        A connection that breaks is tried again, and the upload goes on where it was.

        Args:
            path: the file, or the file itself, open for reading.
            filename: what the server shall call it; the file's own name when left out.
            progress: called with the bytes that the server has, and the bytes of the file.
            timeout_s: deadline of each of its calls.

        Raises:
            LoraInvalid: the file is no adapter.
            UploadsFull: the server keeps no more.
            OSError: the file cannot be read.
            StatusError: see `chromarpc.errors`.
        """
        stub = lora_service_pb2_grpc.LoraServiceStub(self._open_channel())
        deadline_s = self._deadline_s(timeout_s)
        with await asyncio.to_thread(open_file, path) as file:
            steps = upload_steps(file, filename or Path(file.name).name, progress)
            answer: object = None
            while True:
                step = await asyncio.to_thread(advance, steps, answer)
                match step:
                    case Uploaded():
                        return step.lora
                    case Wait():
                        await asyncio.sleep(step.delay_s)
                        answer = None
                    case Call():
                        try:
                            answer = await self._ask(
                                getattr(stub, step.method),
                                step.request,
                                step.timeout_s if deadline_s is None else deadline_s,
                            )
                        except StatusError as error:
                            answer = error

    async def delete_lora(self, path: str, *, timeout_s: float | None = None) -> None:
        """Deletes an uploaded adapter.

        Args:
            path: `sha256:…`, as `StoredLora.path` has it.
            timeout_s: deadline.

        Raises:
            LoraNotFound: there is no such upload.
            InvalidRequest: the adapter is the server's own.
            StatusError: see `chromarpc.errors`.
        """
        stub = lora_service_pb2_grpc.LoraServiceStub(self._open_channel())
        await self._ask(stub.DeleteLora, lora_service_pb2.DeleteLoraRequest(path=path), timeout_s)

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Whether the server, or one of its services, takes requests now.

        Raises:
            StatusError: see `chromarpc.errors`; `ServerUnavailable` where nobody listens.
        """
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._ask(stub.Check, request, timeout_s)
        except NotFound:
            return HealthStatus.SERVICE_UNKNOWN
        return health_status(response)

    async def wait_until_serving(self, *, timeout_s: float) -> None:
        """Returns once the server takes requests, also when it is not even listening yet.

        Raises:
            DeadlineExceeded: it does not within `timeout_s`.
            StatusError: it answers with an error.
        """
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        while True:
            watch = stub.Watch(
                health_pb2.HealthCheckRequest(),
                timeout=max(0.0, deadline_s - clock()),
                metadata=self._connection.metadata,
                wait_for_ready=True,
            )
            try:
                async for response in watch:
                    if health_status(response) is HealthStatus.SERVING:
                        return
            except grpc.aio.AioRpcError as rpc_error:
                error = _error_of(rpc_error, self._connection.target)
                if not isinstance(error, ServerUnavailable):  # else it stopped while we watched
                    raise error from None
            finally:
                watch.cancel()

    async def close(self) -> None:
        """Closes the connection; running generations are cancelled."""
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=LEAVE_WAIT_S)
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _open_channel(self) -> grpc.aio.Channel:
        """The channel, made on first use because it belongs to the event loop that runs then."""
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:
            to = self._connection
            if to.credentials is None:
                self._channel = grpc.aio.insecure_channel(to.target, to.options)
            else:
                self._channel = grpc.aio.secure_channel(to.target, to.credentials, to.options)
        return self._channel

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    async def _ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        deadline_s = self._deadline_s(timeout_s)
        try:
            return await method(
                request,
                timeout=DEFAULT_UNARY_TIMEOUT_S if deadline_s is None else deadline_s,
                metadata=self._connection.metadata,
            )
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self._connection.target) from None


def _error_of(error: grpc.aio.AioRpcError, target: str) -> StatusError:
    return from_status(error.code(), error.details(), error.trailing_metadata(), target=target)
