# Generated from client/chromarpc/aio.py by tools/unasync.py: do not edit.
"""The blocking client."""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Callable, Sequence
from io import BufferedReader
from types import TracebackType
from typing import Any, Self, Unpack

from grpc_health.v1 import health_pb2

from chromarpc._sync.calls import Calls
from chromarpc._sync.event_stream import EventStream
from chromarpc._sync.image_reading import read_image
from chromarpc._sync.leaving import Leaving
from chromarpc._sync.serving import wait_until_serving
from chromarpc._sync.uploading import upload
from chromarpc.channel import DEFAULT_TARGET, TlsOptions, connection
from chromarpc.errors import NotFound
from chromarpc.events import Event, ImageReady
from chromarpc.health import HealthStatus, health_status
from chromarpc.images import GeneratedImage
from chromarpc.jobs import PAGE_SIZE
from chromarpc.leaving import leave_request, must_be_told
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
from chromarpc.upload import UploadProgress
from chromarpc.v1 import generation_service_pb2, job_service_pb2, lora_service_pb2, model_service_pb2

__all__ = ["Client", "EventStream"]


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
        self._calls = Calls(self._connection, timeout_s)
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        """Those whose jobs wait for their caller when the connection is gone."""
        self._leaving = Leaving(self._calls.leave)

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
        call = self._calls.stream(self._calls.generation().Generate, request, timeout_s)
        outlives = request.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_DETACH
        resume = self._watch if outlives else None
        if not must_be_told(request):
            return EventStream(call, self._connection.target, resume)
        request_id, leaving = request.request_id, self._leaving
        stream = EventStream(
            call, self._connection.target, resume, lambda job_id: leaving.begin(leave_request(request_id, job_id))
        )
        self._streams.add(stream)
        return stream

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
        ask = job_service_pb2.CreateJobRequest(request=sent)
        response = self._calls.ask(self._calls.jobs().CreateJob, ask, timeout_s)
        return response.job

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
        request = job_service_pb2.WatchJobRequest(job_id=job_id, after_sequence=after_sequence)
        return self._calls.stream(self._calls.jobs().WatchJob, request, timeout_s)

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> job_service_pb2.Job:
        """How a job is.

        Raises:
            NotFound: there is no such job, or it was forgotten.
            StatusError: see `chromarpc.errors`.
        """
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        response = self._calls.ask(self._calls.jobs().GetJob, request, timeout_s)
        return response.job

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
        jobs: list[job_service_pb2.Job] = []
        token = ""
        while True:
            request = job_service_pb2.ListJobsRequest(page_size=PAGE_SIZE, page_token=token, states=states)
            page = self._calls.ask(self._calls.jobs().ListJobs, request, timeout_s)
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
        request = job_service_pb2.CancelJobRequest(job_id=job_id)
        response = self._calls.ask(self._calls.jobs().CancelJob, request, timeout_s)
        return response.job

    def delete_job(self, job_id: str, *, timeout_s: float | None = None) -> None:
        """Has the server forget a job that ended, and its pictures.

        Raises:
            NotFound: there is no such job.
            StatusError: see `chromarpc.errors`; `FAILED_PRECONDITION` while the job has not ended.
        """
        request = job_service_pb2.DeleteJobRequest(job_id=job_id)
        self._calls.ask(self._calls.jobs().DeleteJob, request, timeout_s)

    def redraw_job(
        self, job_id: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> job_service_pb2.Job:
        """Has a job that ended drawn again: a new job gets its plan, seeds and adapters; `watch_job` follows it.

        On the same model of device, with the same version and settings, it draws the same bytes. Damaged
        pictures of the old job are then whole again too.

        Args:
            job_id: of the job that ended.
            request_id: a UUID to repeat the call under; drawn where none is given.
            timeout_s: deadline of the call, not of the job.

        Raises:
            NotFound: there is no such job, or its model is not served any more.
            StatusError: see `chromarpc.errors`; `NotKept` where its prompts are not stored.
        """
        request = job_service_pb2.RedrawJobRequest(job_id=job_id, request_id=request_id or str(uuid.uuid4()))
        response = self._calls.ask(self._calls.jobs().RedrawJob, request, timeout_s)
        return response.job

    def get_image_bytes(self, job_id: str, prompt_index: int = 0, *, timeout_s: float | None = None) -> bytes:
        """One of a job's pictures again: the encoded file, checked against its SHA-256.

        Raises:
            NotFound: there is no such job, or it has no such picture yet.
            ProtocolError: the bytes are not those that were announced.
            StatusError: see `chromarpc.errors`.
        """
        request = job_service_pb2.GetImageRequest(job_id=job_id, prompt_index=prompt_index)
        return read_image(self._calls, request, timeout_s)

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
        request = model_service_pb2.ListModelsRequest()
        response = self._calls.ask(self._calls.models().ListModels, request, timeout_s)
        return tuple(response.models)

    def server_info(self, *, timeout_s: float | None = None) -> model_service_pb2.GetServerInfoResponse:
        """Version, devices, numerics profiles, limits and queue of the server.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        request = model_service_pb2.GetServerInfoRequest()
        return self._calls.ask(self._calls.models().GetServerInfo, request, timeout_s)

    def list_loras(self, *, timeout_s: float | None = None) -> LoraList:
        """The adapters that requests can name.

        Args:
            timeout_s: deadline of each of its calls, one for 1000 adapters.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        pages: list[lora_service_pb2.ListLorasResponse] = []
        request = list_request(None)
        while request is not None:
            pages.append(self._calls.ask(self._calls.loras().ListLoras, request, timeout_s))
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
        request = lora_service_pb2.InspectLoraRequest(path=path, model=model, hf_token=hf_token)
        response = self._calls.ask(self._calls.loras().InspectLora, request, timeout_s, INSPECT_TIMEOUT_S)
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
        return upload(self._calls, path, filename, progress, timeout_s)

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
        request = lora_service_pb2.DeleteLoraRequest(path=path)
        self._calls.ask(self._calls.loras().DeleteLora, request, timeout_s)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> HealthStatus:
        """Whether the server, or one of its services, takes requests now.

        Raises:
            StatusError: see `chromarpc.errors`; `ServerUnavailable` where nobody listens.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._calls.ask(self._calls.health().Check, request, timeout_s)
        except NotFound:
            return HealthStatus.SERVICE_UNKNOWN
        return health_status(response)

    def wait_until_serving(self, *, timeout_s: float) -> None:
        """Returns once the server takes requests, also when it is not even listening yet.

        Raises:
            DeadlineExceeded: it does not within `timeout_s`.
            StatusError: it answers with an error.
        """
        wait_until_serving(self._calls, timeout_s)

    def close(self) -> None:
        """Closes the connection; running generations are cancelled."""
        self._calls.end()
        for stream in list(self._streams):
            stream.cancel()
        self._leaving.wait()
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
