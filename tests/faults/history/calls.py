"""One client's calls, each with its answer in the record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    lora_service_pb2,
    lora_service_pb2_grpc,
)
from tests.faults.history.adapters import Adapter
from tests.faults.history.memory import Memory
from tests.faults.history.messages import MODEL, EventReader, job_view, outcome, seen_image
from tests.faults.history.recorded import Asked, JobView, Outcome, Recorder, SeenEvent, SeenImage

UNARY_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 120.0
"""A stream that takes longer is broken off by this side."""
_ANY_STATE: Mapping[Any, str] = {}
_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass
class _Answer:
    """What a call was told, while it is told."""

    outcome: Outcome = Outcome()
    job_id: str = ""
    existed: bool | None = None
    views: tuple[JobView, ...] = ()
    events: tuple[SeenEvent, ...] = ()
    images: tuple[SeenImage, ...] = ()
    plan: str = ""
    is_last_page: bool = False
    adapters: tuple[str, ...] = ()
    is_cut: bool = field(default=False, compare=False)


class Calls:
    """Makes calls as one client of one owner."""

    def __init__(self, client: str, token: str, target: str, recorder: Recorder, memory: Memory) -> None:
        """`client`: its name, of which the owner's is the part before the last hyphen."""
        self.client = client
        self.owner = client.rpartition("-")[0]
        self._target = target
        self._recorder = recorder
        self._memory = memory
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel = grpc.insecure_channel(target, options=_RECONNECT)
        self._jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self._generation = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self._loras = lora_service_pb2_grpc.LoraServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def create(self, request: generation_service_pb2.GenerateRequest, asked: Asked) -> Outcome:
        """`CreateJob`."""
        with self._recorded("CreateJob", asked) as answer:
            message = self._ask(self._jobs.CreateJob, job_service_pb2.CreateJobRequest(request=request))
            answer.job_id, answer.existed = message.job.job_id, message.existed
            answer.views = (self._view(message.job),)
            answer.plan = answer.views[0].plan
        return answer.outcome

    def generate(
        self, request: generation_service_pb2.GenerateRequest, asked: Asked, cut_after: int | None
    ) -> Outcome:
        """`Generate`, broken off after so many events."""
        with self._recorded("Generate", asked) as answer:
            timeout_s = asked.deadline_s or STREAM_TIMEOUT_S
            call = self._generation.Generate(request, timeout=timeout_s, metadata=self._metadata)
            self._read(answer, call, cut_after, asked)
        return answer.outcome

    def watch(self, asked: Asked, cut_after: int | None = None) -> Outcome:
        """`WatchJob`, broken off after so many events."""
        with self._recorded("WatchJob", asked) as answer:
            request = job_service_pb2.WatchJobRequest(
                job_id=asked.job_id,
                after_sequence=asked.after_sequence,
                omit_image_bytes=asked.omits_image_bytes,
            )
            answer.job_id = asked.job_id
            call = self._jobs.WatchJob(request, timeout=STREAM_TIMEOUT_S, metadata=self._metadata)
            self._read(answer, call, cut_after, asked)
        return answer.outcome

    def get(self, job_id: str) -> Outcome:
        """`GetJob`."""
        with self._recorded("GetJob", Asked(job_id=job_id)) as answer:
            answer.job_id = job_id
            message = self._ask(self._jobs.GetJob, job_service_pb2.GetJobRequest(job_id=job_id))
            answer.views = (self._view(message.job),)
        return answer.outcome

    def list_pages(self, page_size: int, pages: int, states: Mapping[Any, str] = _ANY_STATE) -> Outcome:
        """`ListJobs`, a call for each page; returns how the last one ended."""
        token, before = "", None
        while True:
            pages -= 1
            asked = Asked(before=before, states=tuple(states.values()))
            with self._recorded("ListJobs", asked) as answer:
                request = job_service_pb2.ListJobsRequest(
                    page_size=page_size, page_token=token, states=list(states)
                )
                message = self._ask(self._jobs.ListJobs, request)
                answer.views = tuple(self._view(job) for job in message.jobs)
                answer.is_last_page = not message.next_page_token
            if not pages or not answer.outcome.is_ok or answer.is_last_page or not answer.views:
                return answer.outcome
            token, before = message.next_page_token, answer.views[-1].place

    def cancel(self, asked: Asked) -> Outcome:
        """`CancelJob`."""
        with self._recorded("CancelJob", asked) as answer:
            request = job_service_pb2.CancelJobRequest(
                job_id=asked.job_id, request_id=asked.request_id, when_unattended=asked.when_unattended
            )
            message = self._ask(self._jobs.CancelJob, request)
            answer.job_id, answer.views = message.job.job_id, (self._view(message.job),)
        return answer.outcome

    def delete(self, job_id: str) -> Outcome:
        """`DeleteJob`."""
        with self._recorded("DeleteJob", Asked(job_id=job_id)) as answer:
            answer.job_id = job_id
            self._ask(self._jobs.DeleteJob, job_service_pb2.DeleteJobRequest(job_id=job_id))
        return answer.outcome

    def redraw(self, asked: Asked) -> Outcome:
        """`RedrawJob`."""
        with self._recorded("RedrawJob", asked) as answer:
            request = job_service_pb2.RedrawJobRequest(job_id=asked.job_id, request_id=asked.request_id)
            message = self._ask(self._jobs.RedrawJob, request)
            answer.job_id, answer.existed = message.job.job_id, message.existed
            answer.views = (self._view(message.job),)
            answer.plan = answer.views[0].plan
        return answer.outcome

    def get_image(self, asked: Asked, cut_after: int | None = None) -> Outcome:
        """`GetImage` of the first prompt, broken off after so many messages."""
        with self._recorded("GetImage", asked) as answer:
            answer.job_id = asked.job_id
            request = job_service_pb2.GetImageRequest(job_id=asked.job_id, offset_bytes=asked.offset_bytes)
            call = self._jobs.GetImage(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)
            header, data = None, bytearray()
            try:
                for message in _until_cut(call, cut_after, answer):
                    if message.HasField("image_header"):
                        header = message.image_header
                        self._memory.told(self.owner, asked.job_id, image_bytes=header.size_bytes)
                    data += message.image_chunk.data
            except grpc.RpcError as error:
                answer.outcome = outcome(error, self._target, is_cut=answer.is_cut)
            if header is not None:
                is_last = answer.outcome.is_ok
                image = seen_image(header, asked.offset_bytes, bytes(data), self._recorder, is_last=is_last)
                answer.images = (image,)
        return answer.outcome

    def upload(self, adapter: Adapter) -> Outcome:
        """All calls of an upload, as one."""
        with self._recorded("UploadLora", Asked(adapter=adapter.sha256)) as answer:
            begun = self._ask(
                self._loras.CreateLoraUpload,
                lora_service_pb2.CreateLoraUploadRequest(
                    filename="a.safetensors", size_bytes=len(adapter.data), sha256=adapter.sha256
                ),
            )
            if not begun.HasField("existing"):
                self._ask(
                    self._loras.AppendLoraUpload,
                    lora_service_pb2.AppendLoraUploadRequest(
                        upload_id=begun.upload_id, offset=0, chunk=adapter.data
                    ),
                )
                request = lora_service_pb2.FinalizeLoraUploadRequest(
                    upload_id=begun.upload_id, sha256=adapter.sha256
                )
                self._ask(self._loras.FinalizeLoraUpload, request)
        return answer.outcome

    def delete_lora(self, sha256: str) -> Outcome:
        """`DeleteLora`."""
        with self._recorded("DeleteLora", Asked(adapter=sha256)) as answer:
            self._ask(self._loras.DeleteLora, lora_service_pb2.DeleteLoraRequest(path=f"sha256:{sha256}"))
        return answer.outcome

    def list_loras(self) -> Outcome:
        """`ListLoras`, all of them."""
        with self._recorded("ListLoras", Asked()) as answer:
            message = self._ask(self._loras.ListLoras, lora_service_pb2.ListLorasRequest(page_size=1000))
            answer.adapters = tuple(lora.sha256 for lora in message.loras)
            answer.is_last_page = not message.next_page_token
        return answer.outcome

    def inspect_lora(self, sha256: str) -> Outcome:
        """`InspectLora`."""
        with self._recorded("InspectLora", Asked(adapter=sha256)) as answer:
            request = lora_service_pb2.InspectLoraRequest(path=f"sha256:{sha256}", model=MODEL)
            answer.adapters = (self._ask(self._loras.InspectLora, request).inspection.sha256,)
        return answer.outcome

    def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        return method(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)

    def _view(self, job: job_service_pb2.Job) -> JobView:
        view = job_view(job)
        size = job.images[0].size_bytes if job.images else 0
        self._memory.told(
            self.owner,
            view.job_id,
            request_id=view.request_id,
            sequence=view.last_sequence,
            image_bytes=size,
        )
        return view

    def _read(self, answer: _Answer, call: Any, cut_after: int | None, asked: Asked) -> None:
        reader = EventReader(self._recorder)
        try:
            for message in _until_cut(call, cut_after, answer):
                reader.take(message.event)
                job_id = reader.job_id or asked.job_id
                if job_id and message.event.WhichOneof("event") != "heartbeat":
                    sequence = message.event.sequence
                    self._memory.told(self.owner, job_id, request_id=asked.request_id, sequence=sequence)
        except grpc.RpcError as error:
            answer.outcome = outcome(error, self._target, is_cut=answer.is_cut)
        answer.job_id = reader.job_id or asked.job_id
        answer.plan = reader.plan
        answer.events = tuple(reader.events)
        answer.images = tuple(reader.images(omitted=asked.omits_image_bytes))

    @contextmanager
    def _recorded(self, method: str, asked: Asked) -> Iterator[_Answer]:
        """Records the call that is made inside, whatever it raises."""
        begun, answer = self._recorder.begin(self.client, self.owner, method, asked), _Answer()
        try:
            yield answer
        except grpc.RpcError as error:
            answer.outcome = outcome(error, self._target, is_cut=False)
        finally:
            told = {name: value for name, value in vars(answer).items() if name != "is_cut"}
            self._recorder.end(replace(begun, ended_s=time.monotonic(), **told))


def _until_cut(call: Any, cut_after: int | None, answer: _Answer) -> Iterator[Any]:
    """The messages of a stream, which is broken off after so many."""
    if cut_after == 0:
        answer.is_cut = True
        call.cancel()
    for count, message in enumerate(call, 1):
        yield message
        if count == cut_after:
            answer.is_cut = True
            call.cancel()
            answer.outcome = Outcome("CANCELLED", is_cut=True)
            return
