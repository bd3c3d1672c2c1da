"""Readers that do not read, and clients that die: the job, the others and the server's memory do not mind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import grpc

import chromarpc
from chromarpc.v1 import generation_service_pb2, job_service_pb2, job_service_pb2_grpc
from tests.conftest import RunningServer

Serve = Callable[..., RunningServer]


def test_a_reader_that_never_reads_holds_nobody_up_and_can_still_read_later(serve: Serve) -> None:
    server = serve()
    request = generation_service_pb2.GenerateRequest(model="chroma-mini", on_disconnect=2)
    request.preview.every_n_steps = 1
    request.preview.max_side_px = 256
    for seed in range(4):
        request.prompts.add(prompt="a", width=256, height=256, sample_steps=60, seed=seed)
    # The smallest window that gRPC takes, so that little of what is sent is taken off the server's hands.
    options = [("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0)]
    with (
        grpc.insecure_channel(server.target, options=options) as channel,
        chromarpc.Client(server.target) as client,
    ):
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        job = stub.CreateJob(job_service_pb2.CreateJobRequest(request=request), timeout=30).job
        idle = stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.job_id))
        first = next(idle).event
        seen = [event for event in client.watch_job(job.job_id) if isinstance(event, chromarpc.ImageReady)]
        assert len(seen) == 4
        assert client.generate_images("another", model="chroma-mini", width=64, height=64, sample_steps=1)
        late = [response.event for response in idle]
    sequences = [event.sequence for event in (first, *late)]
    assert sequences == sorted(set(sequences))
    kinds = [event.WhichOneof("event") for event in late]
    assert kinds[-1] == "completed"
    assert kinds.count("image_header") == 4
    assert kinds.count("preview") < 4 * 59  # what only tells progress was left out on the way
    for number, ready in enumerate(seen):
        parts = [
            e.image_chunk.data for e in late if e.HasField("image_chunk") and e.image_chunk.prompt_index == number
        ]
        assert hashlib.sha256(b"".join(parts)).hexdigest() == ready.image.sha256


def test_the_same_bytes_serve_generate_and_watch() -> None:
    one: Any = generation_service_pb2.GenerateResponse.DESCRIPTOR.fields
    other: Any = job_service_pb2.WatchJobResponse.DESCRIPTOR.fields
    assert [(field.number, field.message_type.full_name) for field in one] == [(1, "chromarpc.v1.JobEvent")]
    assert [(field.number, field.message_type.full_name) for field in other] == [(1, "chromarpc.v1.JobEvent")]
