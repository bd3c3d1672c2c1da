"""Flipped bits in the database: they cost the job that they are in, and no other."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.domain.errors import ChromaError, JobDamaged, StoreDamaged
from chromarpc_server.domain.events import Accepted, Failed
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.domain.requests import GenerationRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.jobs.job import DamagedJob, EndedJob, Job
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.sqlite_file import FILE
from chromarpc_server.runtime.cancellation import Cancellation

FOR_EVER = JobRetention(keep_s=1e9)
PLAN = resolve(GenerationRequest(model="chroma-mini", prompts=(PromptRequest("a fox"),)), Serving())
IDS = [f"job{number}" for number in range(3)]


async def _fill(folder: Path) -> None:
    """Three jobs that ended and one that waits."""
    store = await JobStore.open(folder, FOR_EVER)
    for job_id in (*IDS, "waits"):
        plan = replace(PLAN, request_id=f"request of {job_id}")
        job = Job(plan, (), Cancellation(), owner="me", id=job_id, fingerprint="f")
        await store.insert(job, needs_token=False, adapters=())
        job.log.append(Accepted(job.id, plan))
        if job_id != "waits":
            job.log.append(Failed(ChromaError("for a reason")))
            assert job.log.ending is not None
            assert await store.finish(job, job.log.ending)
    await store.close()


def _change(folder: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount >= 1


async def _listed(store: JobStore) -> dict[str, type]:
    found = await store.page("me", 9, before=None, since_us=None, states=None)
    return {job.id: type(job) for job in found}


@pytest.mark.parametrize("column", ["plan", "ending", "headers", "fingerprint", "format", "state", "done_steps"])
async def test_a_damaged_column_costs_its_job_alone(tmp_path: Path, column: str) -> None:
    await _fill(tmp_path)
    value = {"format": 3, "done_steps": 9}.get(column, "x")
    statement = f"UPDATE jobs SET {column} = ? WHERE id = 'job1'"  # noqa: S608 - names of ours
    if column == "plan":  # another plan, as good as the first: no reader but the checksum sees it
        statement, value = "UPDATE jobs SET plan = replace(plan, ?, 'a fix') WHERE id = 'job1'", "a fox"
    _change(tmp_path, statement, value)
    store = await JobStore.open(tmp_path, FOR_EVER)
    for ask in (store.ended("me", "job1"), store.ended_by_request("me", "request of job1")):
        with pytest.raises(JobDamaged):
            await ask
    assert await _listed(store) == {"job0": EndedJob, "job1": DamagedJob, "job2": EndedJob}
    assert await store.page("me", 9, before=None, since_us=None, states=["cancelled"]) == []
    assert await store.delete("job1")
    assert await _listed(store) == {"job0": EndedJob, "job2": EndedJob}
    await store.close()


async def test_damaged_events_are_told_to_whoever_follows_them(tmp_path: Path) -> None:
    await _fill(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        events = bytearray(connection.execute("SELECT events FROM jobs WHERE id = 'job1'").fetchone()[0])
        events[-1] ^= 1
        connection.execute("UPDATE jobs SET events = ? WHERE id = 'job1'", (bytes(events),))
    store = await JobStore.open(tmp_path, FOR_EVER)
    job = await store.ended("me", "job1")
    assert job is not None
    with pytest.raises(JobDamaged):
        [entry async for entry in job.log.follow()]
    assert store.facts().damaged == {"row": 1}
    await store.close()


async def test_a_job_that_waits_and_cannot_be_read_is_told_to_its_owner(tmp_path: Path) -> None:
    await _fill(tmp_path)
    _change(tmp_path, "UPDATE jobs SET plan = substr(plan, 2) WHERE id = 'waits'")
    store = await JobStore.open(tmp_path, FOR_EVER)
    assert await store.take_over() == ([], True)
    for ask in (store.ended("me", "waits"), store.ended_by_request("me", "request of waits")):
        with pytest.raises(JobDamaged):
            await ask
    assert await store.ended("you", "waits") is None
    assert await store.ended_by_request("you", "request of waits") is None
    await store.close()


async def test_a_time_that_is_damaged_makes_no_sweep_forget_what_is_young(tmp_path: Path) -> None:
    await _fill(tmp_path)
    _change(tmp_path, "UPDATE facts SET value = value | (1 << 55) WHERE name = 'kept_us'")
    _change(tmp_path, "UPDATE jobs SET ended_kept_us = 5 WHERE id = 'job1'")
    store = await JobStore.open(tmp_path, JobRetention(keep_s=3600))
    await store.tend()
    assert (await _listed(store)).keys() >= {"job0", "job2"}
    assert store.size.jobs == 3
    await store.close()


async def test_a_damaged_page_costs_the_list_only_what_is_on_it(tmp_path: Path) -> None:
    store = await JobStore.open(tmp_path, FOR_EVER)
    many = [f"job{number:03}" for number in range(60)]
    for job_id in many:
        job = Job(replace(PLAN, prompts=PLAN.prompts * 3), (), Cancellation(), owner="me", id=job_id)
        await store.insert(job, needs_token=False, adapters=())
        job.log.append(Failed(ChromaError("for a reason")))
        assert job.log.ending is not None
        await store.finish(job, job.log.ending)
    assert len(await _listed(store)) == 9
    _damage_page_of(tmp_path / FILE, store)
    found = await store.page("me", 100, before=None, since_us=None, states=None)
    kinds = [type(job) for job in found]
    assert len(found) == len(many)
    assert 0 < kinds.count(DamagedJob) < 20
    lost = next(job for job in found if isinstance(job, DamagedJob))
    with pytest.raises(JobDamaged):
        await store.ended("me", lost.id)
    with pytest.raises(StoreDamaged):  # nothing to try again
        await store.delete(lost.id)
    good = next(job for job in found if isinstance(job, EndedJob))
    assert await store.ended("me", good.id) is not None
    await store.close()


def _damage_page_of(path: Path, store: JobStore) -> None:
    """Overwrites a leaf page in the middle of the table `jobs`, behind the back of the store that has it open."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        query = "SELECT pageno FROM dbstat WHERE name = 'jobs' AND pagetype = 'leaf' ORDER BY path"
        try:
            pages = [row[0] for row in connection.execute(query)]
        except sqlite3.OperationalError:
            pytest.skip("this SQLite does not tell which page is whose (dbstat)")
    with path.open("r+b") as file:
        file.seek((pages[len(pages) // 2] - 1) * size)
        file.write(b"\xff" * size)
    store._database._connection.execute("PRAGMA shrink_memory")


@pytest.mark.parametrize("column", ["plan", "ending", "headers", "state", "fingerprint", "end_check"])
async def test_text_that_is_text_no_more_costs_its_job_alone_and_is_not_logged(
    tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    await _fill(tmp_path)
    # One flipped bit: the highest of a letter, which is no UTF-8 then.
    _change(
        tmp_path,
        f"UPDATE jobs SET {column} = CAST(CAST('a fox' AS BLOB) || x'e6' AS TEXT) WHERE id = 'job1'",  # noqa: S608
    )
    store = await JobStore.open(tmp_path, FOR_EVER)
    with pytest.raises(JobDamaged):
        await store.ended("me", "job1")
    assert await _listed(store) == {"job0": EndedJob, "job1": DamagedJob, "job2": EndedJob}
    assert not any("fox" in str(vars(record)) for record in caplog.records)
    await store.close()


@pytest.mark.parametrize("column", ["state", "ending", "headers", "end_check", "ended_us"])
async def test_a_damaged_row_keeps_no_other_from_its_end_or_from_being_forgotten(
    tmp_path: Path, column: str
) -> None:
    await _fill(tmp_path)
    # One flipped bit of a row's header makes bytes of a text.
    _change(tmp_path, f"UPDATE jobs SET {column} = CAST({column} AS BLOB) WHERE id = 'job1'")  # noqa: S608
    store = await JobStore.open(tmp_path, JobRetention(keep_s=0))
    (unfinished,), _ = await store.take_over()
    job = Job(unfinished.plan, (), Cancellation(), owner="me", id=unfinished.id)
    assert await store.finish(job, job.log.seal(Failed(ChromaError("for a reason"))))
    await store.tend()
    assert store.size.jobs == 1
    await store.close()


@pytest.mark.parametrize("created_us", [1 << 62, -(1 << 62), 1.5, "x"])
async def test_a_damaged_time_of_admission_costs_its_job_alone(tmp_path: Path, created_us: object) -> None:
    await _fill(tmp_path)
    _change(tmp_path, "UPDATE jobs SET created_us = ? WHERE id IN ('job1', 'waits')", created_us)
    store = await JobStore.open(tmp_path, FOR_EVER)
    await store.take_over()
    assert [job.id for job in store.unreadable_jobs()] == ["waits"]
    assert await _listed(store) == {"job0": EndedJob, "job1": DamagedJob, "job2": EndedJob}
    await store.close()


async def test_a_job_whose_time_of_end_is_damaged_is_damaged_and_not_gone(tmp_path: Path) -> None:
    await _fill(tmp_path)
    _change(tmp_path, "UPDATE jobs SET ended_kept_us = 5 WHERE id = 'job1'")
    store = await JobStore.open(tmp_path, JobRetention(keep_s=3600))
    with pytest.raises(JobDamaged):
        await store.ended("me", "job1")
    with pytest.raises(JobDamaged):
        await store.ended_by_request("me", "request of job1")
    assert await _listed(store) == {"job0": EndedJob, "job1": DamagedJob, "job2": EndedJob}
    assert await store.delete("job1")
    await store.close()


async def test_a_damaged_size_makes_no_sweep_forget_what_there_is_room_for(tmp_path: Path) -> None:
    await _fill(tmp_path)
    _change(tmp_path, "UPDATE jobs SET bytes = bytes | (1 << 40) WHERE id = 'job1'")
    store = await JobStore.open(tmp_path, FOR_EVER)
    assert (await _listed(store)).keys() == {"job0", "job1", "job2"}
    assert await store.delete("job1")
    assert store.size.jobs == 2
    assert 0 < store.size.bytes < 1 << 20
    await store.close()


async def test_a_damaged_page_keeps_nobody_else_from_new_jobs_and_the_time_is_kept(tmp_path: Path) -> None:
    store = await JobStore.open(tmp_path, FOR_EVER)
    for number in range(60):
        job = Job(replace(PLAN, prompts=PLAN.prompts * 3), (), Cancellation(), owner="me", id=f"job{number}")
        await store.insert(job, needs_token=False, adapters=())
        await store.finish(job, job.log.seal(Failed(ChromaError("for a reason"))))
    _damage_page_of(tmp_path / FILE, store)
    (tmp_path / "ballast").unlink()
    store._database._retention = JobRetention(keep_s=0)
    with pytest.raises(StoreDamaged):
        await store.tend()
    assert (tmp_path / "ballast").exists()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM facts WHERE name = 'kept_us'").fetchone() == (1,)
    job = Job(replace(PLAN, request_id="new"), (), Cancellation(), owner="me", id="new")
    await store.insert(job, needs_token=False, adapters=())
    await store.close()
