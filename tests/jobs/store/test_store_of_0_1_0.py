"""A store that chromarpc 0.1.0 wrote opens and means what it meant.

`store_0_1_0/` holds jobs that ended with every kind of event and every reason, and jobs that wait, as 0.1.0 wrote
them. Nothing writes it anew: stored kinds, fields, values and reasons keep the names that they have there.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from chromarpc.json_request import parse_request_json
from chromarpc_server.domain.errors import ChromaError, RequestIdReused
from chromarpc_server.domain.events import Cancelled, Completed, Failed, ImageChunk, ImageHeader, Prepared, Step
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.records import STORED_NAMES
from chromarpc_server.transport.messages.fingerprints import fingerprint

WRITTEN = Path(__file__).parent / "store_0_1_0"
REQUEST = json.loads((WRITTEN.parent / "stored_before_preview_profiles.json").read_text("utf-8"))
"""A request as JSON, and the fingerprint that 0.1.0 gave it; the jobs of the store have made-up ones."""
EXPECTED = json.loads((WRITTEN / "expected.json").read_text("utf-8"))
FOR_EVER = JobRetention(keep_s=1e9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copied = tmp_path / "jobs"
    shutil.copytree(WRITTEN, copied, ignore=shutil.ignore_patterns("expected.json"))
    return copied


async def test_a_job_with_every_kind_of_event_comes_back(folder: Path) -> None:
    store = await JobStore.open(folder, FOR_EVER)
    try:
        job = await store.ended("caller", "succeeded")
        assert job is not None
        assert (job.plan.prompts[0].prompt, job.plan.prompts[0].neg) == ("a red circle", "blurry")
        assert [lora.network_multiplier for lora in job.plan.loras] == [0.5, 1.0]
        assert job.plan.trainer is not None
        entries = [entry async for entry in job.log.follow() if entry is not None]
    finally:
        await store.close()
    told = [[entry.sequence, STORED_NAMES[type(entry.event)]] for entry in entries]
    assert told == EXPECTED["succeeded"]["sequences"]
    events = {type(entry.event): entry.event for entry in entries}
    prepared, header, chunk, done = (events[kind] for kind in (Prepared, ImageHeader, ImageChunk, Completed))
    assert isinstance(prepared, Prepared)
    assert (prepared.adapters[0].unmatched_keys, prepared.weights.evicted_sets) == (("odd.key",), 1)
    assert isinstance(header, ImageHeader)
    assert isinstance(chunk, ImageChunk)
    assert len(chunk.data) == header.size_bytes
    assert isinstance(done, Completed)
    assert done.timings.total_s == 7
    steps = [entry.event for entry in entries if isinstance(entry.event, Step)]
    assert steps[0].sigmas == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("name", [name for name, told in EXPECTED.items() if "reason" in told])
async def test_a_job_that_ended_early_says_why(folder: Path, name: str) -> None:
    store = await JobStore.open(folder, FOR_EVER)
    try:
        job = await store.ended("caller", name)
    finally:
        await store.close()
    assert job is not None
    ending = job.log.ending.event
    assert isinstance(ending, Failed | Cancelled)
    error: ChromaError = ending.error
    assert (error.reason, error.message) == (EXPECTED[name]["reason"], "what happened")
    assert (error.metadata, error.retry_after_s) == ({"key": "value"}, 1.5)
    assert [violation.field for violation in error.violations] == ["prompts.0.width"]
    assert error.quota is not None
    assert error.quota.limit == 4


async def test_jobs_that_did_not_end_are_taken_over(folder: Path) -> None:
    store = await JobStore.open(folder, FOR_EVER)
    try:
        left, _ = await store.take_over()
    finally:
        await store.close()
    assert [(job.id, job.was_begun, job.is_cancelled) for job in left] == [
        ("waiting", False, False),
        ("begun", True, False),
        ("cancelled-while-waiting", False, True),
    ]
    assert [None if known is None else known.sha256 for known in left[0].adapters] == ["cd" * 32, None]
    assert left[0].plan.request_id == "request-2"


async def test_the_request_of_a_job_finds_it_again_and_another_one_is_refused(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as written, written:
        written.execute("UPDATE jobs SET fingerprint = ? WHERE id = 'succeeded'", (REQUEST["fingerprint"],))
    request = parse_request_json(json.dumps(REQUEST["request"])).request
    store = await JobStore.open(folder, FOR_EVER)
    try:
        registry = JobRegistry(store, FOR_EVER)
        job = await registry.existing("caller", "request-1", fingerprint(request))
        request.prompts[0].seed = 8
        with pytest.raises(RequestIdReused):
            await registry.existing("caller", "request-1", fingerprint(request))
    finally:
        await store.close()
    assert job is not None
    assert job.id == "succeeded"
