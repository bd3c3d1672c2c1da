"""Nothing that a stock client asks for outgrows its limit of 4 MiB, and no error its limit on trailers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
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
    lora_service_pb2,
    lora_service_pb2_grpc,
)
from tests.conftest import RunningServer

Serve = Callable[..., RunningServer]
MIB = 2**20
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
LONG: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "sample_steps": 150}


def _prompts(text: str, count: int = 64) -> generation_service_pb2.GenerateRequest:
    return build_request([text] * count, **SMALL)


def _told(error: pytest.ExceptionInfo[grpc.RpcError]) -> chromarpc.StatusError:
    status = error.value
    return chromarpc.errors.from_status(status.code(), status.details(), status.trailing_metadata(), target="")


@pytest.fixture
def busy(serve: Serve) -> Iterator[RunningServer]:
    """A server whose jobs wait."""
    server = serve()
    with chromarpc.Client(server.target) as client:
        running = client.create_job("a", **LONG)
        yield server
        for job in client.list_jobs():
            client.cancel_job(job.job_id)
        client.cancel_job(running.job_id)


def _pages(jobs: job_service_pb2_grpc.JobServiceStub, page_size: int) -> list[job_service_pb2.ListJobsResponse]:
    pages = [jobs.ListJobs(job_service_pb2.ListJobsRequest(page_size=page_size), timeout=30)]
    while token := pages[-1].next_page_token:
        pages.append(
            jobs.ListJobs(job_service_pb2.ListJobsRequest(page_size=page_size, page_token=token), timeout=30)
        )
    return pages


def test_a_stock_client_lists_jobs_of_many_long_prompts(busy: RunningServer) -> None:
    request = _prompts("x" * 25_000)
    with grpc.insecure_channel(busy.target) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        made = [
            jobs.CreateJob(job_service_pb2.CreateJobRequest(request=request), timeout=30).job.job_id
            for _ in range(3)
        ]
        try:
            pages = _pages(jobs, 1000)
        except grpc.RpcError as error:
            pages = []
            assert error.code() is grpc.StatusCode.OK, error.details()
        listed = [job.job_id for page in pages for job in page.jobs]
    assert listed[:3] == made[::-1]
    assert len(listed) == 4
    assert all(page.jobs for page in pages)
    assert all(len(page.jobs) == 1 or page.ByteSize() <= MIB for page in pages)


def test_pages_hold_as_many_as_were_asked_for_where_they_are_small(busy: RunningServer) -> None:
    with grpc.insecure_channel(busy.target) as channel, chromarpc.Client(busy.target) as client:
        made = [client.create_job("a", **SMALL).job_id for _ in range(24)]
        pages = _pages(job_service_pb2_grpc.JobServiceStub(channel), 20)
    assert [len(page.jobs) for page in pages] == [20, 5]
    assert [job.job_id for page in pages for job in page.jobs][:24] == made[::-1]


@pytest.mark.parametrize("text", ["x" * 65_000, "[trigger] " * 2000], ids=["long", "replaced"])
def test_a_request_whose_job_could_not_be_told_is_refused_by_field(busy: RunningServer, text: str) -> None:
    request = _prompts(text)
    request.trigger_word = "w" * 20
    with grpc.insecure_channel(busy.target) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        generate = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate
        calls: list[Callable[[], object]] = [
            lambda: jobs.CreateJob(job_service_pb2.CreateJobRequest(request=request), timeout=30),
            lambda: next(generate(request, timeout=30)),
        ]
        for call in calls:
            try:
                call()
                code, fields, message = grpc.StatusCode.OK, [], ""
            except grpc.RpcError as error:
                code = error.code()
                message = error.details() or ""
                told = chromarpc.errors.from_status(code, message, error.trailing_metadata(), target="")
                fields = [violation.field for violation in told.violations]
            assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["prompts"])
            assert "send several requests" in message
        assert len(jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=30).jobs) == 1


def test_the_largest_job_that_is_admitted_is_told_everywhere_to_a_stock_client(busy: RunningServer) -> None:
    """With every warning that a prompt can have, in a script of which each character takes four bytes."""
    with grpc.insecure_channel(busy.target) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        low, high, largest = 7_000, 7_680, None
        while high - low > 64:
            length = (low + high) // 2
            request = _prompts("𝕏" * length)
            for prompt in request.prompts:
                prompt.neg, prompt.fps, prompt.trigger_word, prompt.width = "n", 24, "unused", 65
            try:
                largest = jobs.CreateJob(job_service_pb2.CreateJobRequest(request=request), timeout=30).job
                jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=largest.job_id), timeout=30)
                low = length
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                high = length
        assert largest is not None
        got = jobs.GetJob(job_service_pb2.GetJobRequest(job_id=largest.job_id), timeout=30)
        events = list(jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=largest.job_id), timeout=30))
        first = jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=30)
    sizes = [largest.ByteSize(), got.ByteSize(), events[0].ByteSize(), first.ByteSize()]
    assert len(got.job.plan.warnings) == 4 * 64
    assert all(1.8 * MIB < size <= 2 * MIB for size in sizes)


def test_a_request_id_is_no_longer_than_a_uuid_is(busy: RunningServer) -> None:
    request = build_request("a", **SMALL, request_id="-" * 3_000_000 + "0" * 32)
    with grpc.insecure_channel(busy.target) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            jobs.CreateJob(job_service_pb2.CreateJobRequest(request=request), timeout=30)
    assert [violation.field for violation in _told(error).violations] == ["request_id"]


def test_a_job_of_before_that_is_too_large_is_told_with_its_prompts_cut(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        job = client.create_job(["a"] * 64, **SMALL)
        small = client.create_job("a", **SMALL)
        for job_id in (job.job_id, small.job_id):
            list(client.watch_job(job_id))
    server.stop()
    with closing(sqlite3.connect(tmp_path / "data" / "jobs" / "jobs.sqlite3")) as store, store:
        (text,) = store.execute("SELECT plan FROM jobs WHERE id = ?", (job.job_id,)).fetchone()
        plan = json.loads(text)
        for prompt in plan["prompts"]:
            prompt["prompt"] = "y" * 65_536
        store.execute("UPDATE jobs SET plan = ?, plan_check = NULL WHERE id = ?", (json.dumps(plan), job.job_id))
    server = serve()
    with grpc.insecure_channel(server.target) as channel:
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        try:
            listed = [found for page in _pages(jobs, 100) for found in page.jobs]
        except grpc.RpcError as error:
            listed = []
            assert error.code() is grpc.StatusCode.OK, error.details()
        events = list(jobs.WatchJob(job_service_pb2.WatchJobRequest(job_id=job.job_id), timeout=30))
    assert [found.job_id for found in listed] == [small.job_id, job.job_id]
    for plan in (listed[1].plan, events[0].event.accepted):
        assert [warning.code for warning in plan.warnings] == ["PROMPTS_CUT"]
        assert all(len(prompt.prompt) > 10_000 and prompt.prompt.endswith("…") for prompt in plan.prompts)
    assert events[-1].event.WhichOneof("event") == "completed"


def test_a_page_of_adapters_ends_before_a_mebibyte(serve: Serve, tmp_path: Path) -> None:
    root = tmp_path / "loras"
    folder = root.joinpath(*("d" * 250 for _ in range(8)))
    folder.mkdir(parents=True)
    for number in range(700):
        (folder / f"{number:04}{'n' * 200}.safetensors").touch()
    server = serve(lora_root=root)
    with grpc.insecure_channel(server.target) as channel:
        loras = lora_service_pb2_grpc.LoraServiceStub(channel)
        pages, token = [], ""
        while True:
            request = lora_service_pb2.ListLorasRequest(page_size=1000, page_token=token)
            pages.append(loras.ListLoras(request, timeout=30))
            token = pages[-1].next_page_token
            if not token:
                break
    names = [lora.path for page in pages for lora in page.loras]
    assert len(names) == len(set(names)) == 700
    assert max(page.ByteSize() for page in pages) <= MIB
