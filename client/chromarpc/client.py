"""The blocking client."""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chromarpc.channel import DEFAULT_TARGET, DEFAULT_UNARY_TIMEOUT_S, TlsOptions, connection
from chromarpc.errors import NotFound, ServerUnavailable, StatusError, from_status
from chromarpc.events import Event, ImageReady
from chromarpc.health import HealthStatus, health_status
from chromarpc.images import GeneratedImage
from chromarpc.jobs import MOST_TRIES, PAGE_SIZE, ImageCollector, wait_s
from chromarpc.leaving import LEAVE_WAIT_S, Leaving, leave_request, must_be_told
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


class EventStream(Iterator[Event]):
    """The events of one generation, in order; the call is already on its way.

    Leaving it before the end (`with`, `close()`, or dropping the last reference) cancels the call, and the
    server stops within one step. A job that was made with `detach` goes on.
    """

    def __init__(
        self,
        call: Any,
        target: str,
        resume: Callable[[str, int], Any] | None = None,
        leave: Callable[[str | None], threading.Event] | None = None,
    ) -> None:
        """Reads a call.

        Args:
            call: at once an iterator and a grpc.Call, which the stubs cannot say.
            target: named where it cannot be reached.
            resume: watches a job from the event after a sequence, where the job outlives a lost connection.
            leave: tells the server that a job is not wanted any more, where cancelling the call does not; is
                given the job's id once that is known.
        """
        self._leave = None
        self._over = False
        self._call = call
        self._target = target
        self._resume = resume
        self._leave = leave
        self._tries = 0
        self._reader = StreamReader()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Waits for the next event.

        Raises:
            StopIteration: after `Completed`.
            StatusError: the call ended with an error; see `chromarpc.errors`.
            ProtocolError: the stream broke its contract; the call was cancelled.
        """
        if self._over:
            raise StopIteration
        try:
            while True:
                event = self._next_event()
                if event is not None:
                    return event
        except (StatusError, StopIteration):
            self._over = True  # and not left: where the connection was lost, the call may be made again
            self._call.cancel()
            raise
        except BaseException:
            self.close()
            raise

    def _next_event(self) -> Event | None:
        try:
            response = next(self._call)
        except grpc.RpcError:
            error = self._reader.ending or _error_of(self._call, self._target)
            if not self._come_back(error):
                raise error from None
            return None
        except StopIteration:
            self._reader.finish()
            raise
        self._tries = 0
        return self._reader.read(response)

    def _come_back(self, error: StatusError) -> bool:
        """Takes a lost connection up again after the last event that came. Whether it makes sense."""
        job_id = self._reader.job_id
        lost = isinstance(error, ServerUnavailable) and self._reader.ending is None
        if self._resume is None or job_id is None or not lost or self._tries >= MOST_TRIES or self._over:
            return False
        time.sleep(wait_s(self._tries))
        self._tries += 1
        self._call = self._resume(job_id, self._reader.sequence)
        return True

    def cancel(self) -> None:
        """Cancels the call, from any thread; whoever waits for an event gets `Cancelled`."""
        self._cancel()

    def close(self) -> None:
        """Ends the iteration, cancelling the call if it still runs."""
        told = self._cancel()
        self._over = True
        if told is not None:
            told.wait(LEAVE_WAIT_S)

    def _cancel(self) -> threading.Event | None:
        """Cancels the call and, where that does not end the job at once, begins to tell the server."""
        is_over, leave = self._over, self._leave
        self._leave = None  # once is enough
        self._call.cancel()
        return None if is_over or leave is None else leave(self._reader.job_id)

    def __del__(self) -> None:
        if self._leave is not None and not self._over:
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Client:
    """Speaks to one server; its methods may be called from several threads at once.

    Opens its connection with the first call. Close it after use, or use it as a context manager.
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
        """Makes the channel; connects to nothing yet.

        Args:
            target: `host:port`, or any other gRPC target.
            token: sent with every call as `authorization: Bearer`; only over TLS or to this machine.
            tls: True checks the server against well-known authorities; `TlsOptions` says more.
            timeout_s: deadline of calls that name none themselves. Without it generations have none, and the
                short calls 10 s.
            allow_insecure_token: send the token in plain text even to another machine.

        Raises:
            ValueError: a token that may not be sent, or half of a client certificate.
            OSError: a TLS file cannot be read.
        """
        self._connection = connection(target, token=token, tls=tls, allow_insecure_token=allow_insecure_token)
        self._timeout_s = timeout_s
        self._closed = False
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        """Those whose jobs wait for their caller when the connection is gone."""
        self._leaving = Leaving(self._tell)
        if self._connection.credentials is None:
            self._channel = grpc.insecure_channel(target, self._connection.options)
        else:
            self._channel = grpc.secure_channel(target, self._connection.credentials, self._connection.options)

    def __repr__(self) -> str:
        return f"Client({self._connection.target!r})"

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> EventStream:
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
    ) -> EventStream:
        """The same for a ready message, such as `parse_request_json` gives."""
        stub = generation_service_pb2_grpc.GenerationServiceStub(self._open_channel())
        call = stub.Generate(request, timeout=self._deadline_s(timeout_s), metadata=self._connection.metadata)
        outlives = request.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_DETACH
        resume = self._watch if outlives else None
        if not must_be_told(request):
            return EventStream(call, self._connection.target, resume)
        request_id, leaving = request.request_id, self._leaving
        stream = EventStream(
            call,
            self._connection.target,
            resume,
            lambda job_id: leaving.begin(leave_request(request_id, job_id)),
        )
        self._streams.add(stream)
        return stream

    def _tell(self, request: job_service_pb2.CancelJobRequest) -> None:
        stub = job_service_pb2_grpc.JobServiceStub(self._channel)
        stub.CancelJob(request, timeout=LEAVE_WAIT_S, metadata=self._connection.metadata)

    def create_job(
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
        return self.create_job_request(build_request(prompts, **options), timeout_s=timeout_s)

    def create_job_request(
        self, request: generation_service_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> job_service_pb2.Job:
        """The same for a ready message, such as `parse_request_json` gives."""
        sent = generation_service_pb2.GenerateRequest()
        sent.CopyFrom(request)
        if not sent.HasField("request_id"):
            sent.request_id = str(uuid.uuid4())
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        return self._ask(stub.CreateJob, job_service_pb2.CreateJobRequest(request=sent), timeout_s).job

    def watch_job(self, job_id: str, *, timeout_s: float | None = None) -> EventStream:
        """A job's events from the first on, also after it ended. Leaving early does nothing to the job.

        A lost connection is taken up again after the last event that came.

        Args:
            job_id: as `Accepted.job_id` has it.
            timeout_s: deadline of each connection.

        Raises:
            What the server refuses is raised by the iteration: `NotFound` where there is no such job.
        """
        call = self._watch(job_id, 0, timeout_s)
        return EventStream(call, self._connection.target, self._watch)

    def _watch(self, job_id: str, after_sequence: int, timeout_s: float | None = None) -> Any:
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        request = job_service_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
        return stub.WatchJob(request, timeout=self._deadline_s(timeout_s), metadata=self._connection.metadata)

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> job_service_pb2.Job:
        """How a job is.

        Raises:
            NotFound: there is no such job, or it was forgotten.
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        return self._ask(stub.GetJob, job_service_pb2.GetJobRequest(job_id=job_id), timeout_s).job

    def list_jobs(
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
            page = self._ask(stub.ListJobs, request, timeout_s)
            jobs += page.jobs
            token = page.next_page_token
            if not token:
                return tuple(jobs)

    def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> job_service_pb2.Job:
        """Stops a job: at once while it waits, within one step while it runs.

        Raises:
            NotFound: there is no such job.
            StatusError: see `chromarpc.errors`.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        return self._ask(stub.CancelJob, job_service_pb2.CancelJobRequest(job_id=job_id), timeout_s).job

    def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Has the server forget a job that ended, and its pictures.

        Raises:
            NotFound: there is no such job.
            StatusError: see `chromarpc.errors`; `FAILED_PRECONDITION` while the job has not ended.
        """
        stub = job_service_pb2_grpc.JobServiceStub(self._open_channel())
        self._ask(stub.DeleteJob, job_service_pb2.DeleteJobRequest(job_id=job_id), timeout_s)

    def get_image_bytes(self, job_id: str, prompt_index: int = 0, *, timeout_s: float | None = None) -> bytes:
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
            for response in call:
                collected.take(response)
        except grpc.RpcError:
            raise _error_of(call, self._connection.target) from None
        finally:
            call.cancel()
        return collected.finish()[1]

    def generate_images(
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
        with self.generate(prompts, timeout_s=timeout_s, **options) as stream:
            for event in stream:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, ImageReady):
                    images.append(event.image)
        return sorted(images, key=lambda image: image.prompt_index)

    def list_models(self, *, timeout_s: float | None = None) -> tuple[model_service_pb2.Model, ...]:
        """The models that requests can name, in the server's order.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = model_service_pb2_grpc.ModelServiceStub(self._open_channel())
        response = self._ask(stub.ListModels, model_service_pb2.ListModelsRequest(), timeout_s)
        return tuple(response.models)

    def server_info(self, *, timeout_s: float | None = None) -> model_service_pb2.GetServerInfoResponse:
        """Version, device, numerics profiles, limits and queue of the server.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        stub = model_service_pb2_grpc.ModelServiceStub(self._open_channel())
        return self._ask(stub.GetServerInfo, model_service_pb2.GetServerInfoRequest(), timeout_s)

    def list_loras(self, *, timeout_s: float | None = None) -> LoraList:
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
            pages.append(self._ask(stub.ListLoras, request, timeout_s))
            request = list_request(pages[-1])
        return lora_list(pages)

    def inspect_lora(
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
        response = self._ask(stub.InspectLora, request, INSPECT_TIMEOUT_S if deadline_s is None else deadline_s)
        return lora_inspection(response.inspection)

    def upload_lora(
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
        with open_file(path) as file:
            steps = upload_steps(file, filename or Path(file.name).name, progress)
            answer: object = None
            while True:
                step = advance(steps, answer)
                match step:
                    case Uploaded():
                        return step.lora
                    case Wait():
                        time.sleep(step.delay_s)
                        answer = None
                    case Call():
                        try:
                            answer = self._ask(
                                getattr(stub, step.method),
                                step.request,
                                step.timeout_s if deadline_s is None else deadline_s,
                            )
                        except StatusError as error:
                            answer = error

    def delete_lora(self, path: str, *, timeout_s: float | None = None) -> None:
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
        self._ask(stub.DeleteLora, lora_service_pb2.DeleteLoraRequest(path=path), timeout_s)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Whether the server, or one of its services, takes requests now.

        Raises:
            StatusError: see `chromarpc.errors`; `ServerUnavailable` where nobody listens.
        """
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        try:
            response = self._ask(stub.Check, health_pb2.HealthCheckRequest(service=service), timeout_s)
        except NotFound:
            return HealthStatus.SERVICE_UNKNOWN
        return health_status(response)

    def wait_until_serving(self, *, timeout_s: float) -> None:
        """Returns once the server takes requests, also when it is not even listening yet.

        Raises:
            DeadlineExceeded: it does not within `timeout_s`.
            StatusError: it answers with an error.
        """
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        deadline_s = time.monotonic() + timeout_s
        while True:
            watch: Any = stub.Watch(
                health_pb2.HealthCheckRequest(),
                timeout=max(0.0, deadline_s - time.monotonic()),
                metadata=self._connection.metadata,
                wait_for_ready=True,
            )
            try:
                for response in watch:
                    if health_status(response) is HealthStatus.SERVING:
                        return
            except grpc.RpcError:
                error = _error_of(watch, self._connection.target)
                if not isinstance(error, ServerUnavailable):  # else it stopped while we watched
                    raise error from None
            finally:
                watch.cancel()

    def close(self) -> None:
        """Closes the connection; running generations are cancelled."""
        self._closed = True
        for stream in list(self._streams):
            stream.cancel()
        self._leaving.wait()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_channel(self) -> grpc.Channel:
        if self._closed:
            raise RuntimeError("the client is closed")
        return self._channel

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    def _ask(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        deadline_s = self._deadline_s(timeout_s)
        try:
            return method(
                request,
                timeout=DEFAULT_UNARY_TIMEOUT_S if deadline_s is None else deadline_s,
                metadata=self._connection.metadata,
            )
        except grpc.RpcError as error:
            raise _error_of(error, self._connection.target) from None


def _error_of(call: Any, target: str) -> StatusError:
    return from_status(call.code(), call.details(), call.trailing_metadata(), target=target)
