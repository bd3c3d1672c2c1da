"""The job store: ended once, found again, forgotten in time, and never silently damaged."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from chromarpc_server.domain.errors import Draining, JobDamaged
from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.job import DamagedJob
from chromarpc_server.jobs.store.database import Database
from chromarpc_server.jobs.store.images import DamagedImage, ImageFolder
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.kept_time import KeptTime
from chromarpc_server.jobs.store.rows import EndRow, NewRow
from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.jobs.store.unusable import StoreUnusable

CONTENTS = [bytes([digit]) * 100 for digit in b"abcdef"]
HASHES = [hashlib.sha256(content).hexdigest() for content in CONTENTS]
DAY_US = 24 * 3600 * 10**6


@dataclass
class Kept:
    """A store in a folder, and the time in it."""

    folder: Path
    retention: JobRetention
    now: float = 1e9

    def open(self) -> Database:
        return Database(
            self.folder / "jobs.sqlite3",
            ImageFolder(self.folder / "images"),
            self.retention,
            make_time=self.time,
        )

    def time(self, kept_s: float | None) -> KeptTime:
        """Both clocks go together."""
        return KeptTime(kept_s, wall=lambda: self.now, monotonic=lambda: self.now)

    def images(self) -> set[str]:
        return {path.name for path in (self.folder / "images").glob("[0-9a-f][0-9a-f]/*")}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path, JobRetention(keep_s=3600))


@pytest.fixture
def database(kept: Kept) -> Iterator[Database]:
    opened = kept.open()
    yield opened
    opened.close()


def _row(number: int, **changes: object) -> NewRow:
    row = NewRow(f"job{number}", "me", None, "f", 10**15 + number, "{}", True, False, "[]")
    return replace(row, **changes)  # type: ignore[arg-type]


def _end(number: int, kept: Kept, *images: str, size: int = 100) -> EndRow:
    return EndRow(
        f"job{number}", round(kept.now * 1e6), "succeeded", 3, "[]", "[]", b"", list(images), size * len(images)
    )


def _finish(database: Database, kept: Kept, number: int, *images: str) -> None:
    database.insert(_row(number))
    for sha256 in images:
        database.put_image(sha256, CONTENTS[HASHES.index(sha256)], "me")
    assert database.finish(_end(number, kept, *images))
    kept.now += 1


def test_a_job_ends_once(database: Database, kept: Kept) -> None:
    _finish(database, kept, 1, HASHES[0])
    assert not database.finish(replace(_end(1, kept), state="failed"))
    row = database.ended("me", "job1")
    assert row is not None
    assert row["state"] == "succeeded"
    assert database.ended("you", "job1") is None
    assert not database.finish(_end(2, kept))


def test_what_did_not_end_is_taken_over_in_order(kept: Kept) -> None:
    first = kept.open()
    for number in (3, 1, 2):
        first.insert(_row(number))
    first.begin("job1", 5)
    first.finish(_end(2, kept))
    first.close()
    second = kept.open()
    taken, _ = second.take_over()
    assert [(row["id"], row["attempts"], row["starts"]) for row in taken] == [("job3", 0, 1), ("job1", 1, 1)]
    second.unbegin("job1")
    assert [row["attempts"] for row in second.take_over()[0]] == [0, 0]
    second.close()


def test_a_cancel_is_kept_and_a_request_id_is_given_up_by_a_job_that_ended(kept: Kept) -> None:
    first = kept.open()
    for number in (1, 2):
        first.insert(_row(number, request_id=f"r{number}"))
    first.note_cancelled("job1")
    first.finish(_end(2, kept))
    for job_id in ("job1", "job2"):
        first.release_request_id(job_id)
    first.insert(_row(3, request_id="r2"))
    with pytest.raises(sqlite3.IntegrityError):
        first.insert(_row(4, request_id="r1"))  # its job has not ended
    first.close()
    second = kept.open()
    assert [(row["id"], row["cancelled"]) for row in second.take_over()[0]] == [("job1", 1), ("job3", 0)]
    second.close()


def test_a_picture_goes_with_the_last_job_that_names_it(database: Database, kept: Kept) -> None:
    _finish(database, kept, 1, HASHES[0], HASHES[1])
    _finish(database, kept, 2, HASHES[0])
    assert database.delete("job1")
    assert kept.images() == {HASHES[0]}
    database.put_image(HASHES[0], CONTENTS[0], "me")  # of a job that still runs
    assert database.delete("job2")
    assert kept.images() == {HASHES[0]}
    database.insert(_row(3))
    assert database.finish(_end(3, kept))
    assert not database.delete("job2")


def test_the_old_go_and_then_the_oldest_of_too_much(database: Database, kept: Kept) -> None:
    kept.retention = JobRetention(keep_s=3600, keep_bytes=250)
    for number, sha256 in enumerate(HASHES[:2]):
        _finish(database, kept, number, sha256)
    database.close()
    database = kept.open()
    for number, sha256 in enumerate(HASHES[2:4], 2):
        _finish(database, kept, number, sha256)
    assert kept.images() == set(HASHES[2:4])
    assert (database.size.jobs, database.size.bytes) == (2, 200)
    kept.now += 3600
    assert database.ended("me", "job3") is None  # too old to be told of, swept or not
    database.sweep()
    assert kept.images() == set()
    assert database.size.jobs == 0
    database.close()


def test_the_newest_job_stays_however_large_it_is(database: Database, kept: Kept) -> None:
    kept.retention = JobRetention(keep_bytes=1)
    database.close()
    database = kept.open()
    _finish(database, kept, 1, HASHES[0])
    _finish(database, kept, 2, HASHES[1])
    assert kept.images() == {HASHES[1]}
    database.close()


def test_what_an_interrupted_write_left_is_removed(kept: Kept) -> None:
    database = kept.open()
    _finish(database, kept, 1, HASHES[0])
    database.put_image(HASHES[1], CONTENTS[1], "me")
    database.close()
    (kept.folder / "images" / HASHES[0][:2] / "1234.part").write_bytes(b"half")
    kept.open().close()
    assert kept.images() == {HASHES[0]}


def test_pages_are_newest_first_and_do_not_overlap(database: Database, kept: Kept) -> None:
    for number in range(5):
        _finish(database, kept, number)
    first = database.page("me", 2, before=None, since_us=None, states=None)
    last = (first[-1]["created_us"], first[-1]["id"])
    rest = database.page("me", 9, before=last, since_us=10**15 + 1, states=["succeeded"])
    assert [row["id"] for row in (*first, *rest)] == ["job4", "job3", "job2", "job1"]
    assert database.page("me", 9, before=None, since_us=None, states=["failed"]) == []


def test_one_request_id_makes_one_row(database: Database) -> None:
    database.insert(_row(1, request_id="r"))
    database.insert(_row(2, request_id="r", owner="you"))
    with pytest.raises(sqlite3.IntegrityError):
        database.insert(_row(3, request_id="r"))


def test_files_are_for_the_server_alone(kept: Kept) -> None:
    async def go() -> None:
        store = await JobStore.open(kept.folder / "jobs", kept.retention)
        await store.close()

    import asyncio

    asyncio.run(go())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (kept.folder / "jobs").iterdir()}
    assert modes["jobs.sqlite3"] == 0o600
    assert modes["images"] == 0o700


def test_a_damaged_database_is_left_alone_and_named(kept: Kept) -> None:
    path = kept.folder / "jobs.sqlite3"
    database = kept.open()
    for number in range(200):
        database.insert(_row(number, plan="x" * 1000))
    database.close()
    whole = path.read_bytes()
    for damaged in (b"no database at all" * 500, whole[:8192] + b"\xff" * 8192 + whole[16384:]):
        path.write_bytes(damaged)
        with pytest.raises(StoreUnusable, match=r"jobs\.sqlite3 is damaged .*store repair"):
            kept.open()
        assert path.read_bytes() == damaged


def test_a_newer_schema_is_left_alone_and_named(kept: Kept) -> None:
    kept.open().close()
    with sqlite3.connect(kept.folder / "jobs.sqlite3") as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(StoreUnusable, match="written by a newer chromarpc"):
        kept.open()


async def test_two_servers_do_not_share_a_store(kept: Kept) -> None:
    first = await JobStore.open(kept.folder, kept.retention)
    with pytest.raises(StoreUnusable, match="in use by another process"):
        await JobStore.open(kept.folder, kept.retention)
    await first.close()
    await (await JobStore.open(kept.folder, kept.retention)).close()


def test_a_first_version_database_is_still_read(kept: Kept) -> None:
    # The statements of the first release, as they were: the step itself may never change.
    recorded = (Path(__file__).parent / "store_schema_1.sql").read_text(encoding="utf-8")
    kept.now = 4e9
    with sqlite3.connect(kept.folder / "jobs.sqlite3") as connection:
        connection.executescript(recorded)
    connection.close()
    database = kept.open()
    (left,), _ = database.take_over()
    assert (left["id"], left["owner"], left["attempts"]) == ("job1", "me", 1)
    assert not left["cancelled"]
    ended = database.page("me", 9, before=None, since_us=None, states=None)
    assert [row["id"] for row in ended] == ["job2"]
    database.close()


def test_an_end_that_is_written_stays_so_although_others_cannot_be_forgotten(
    database: Database, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise sqlite3.OperationalError("database or disk is full")

    database.insert(_row(1))
    database.put_image(HASHES[0], CONTENTS[0], "me")
    monkeypatch.setattr(database, "sweep", full)
    assert database.finish(_end(1, kept, HASHES[0]))
    assert kept.images() == {HASHES[0]}


def test_the_request_id_of_a_job_that_is_too_old_makes_another(database: Database, kept: Kept) -> None:
    database.insert(_row(1, request_id="r"))
    assert database.finish(_end(1, kept))
    kept.now += 3600
    assert database.ended_by_request("me", "r") is None
    database.insert(_row(2, request_id="r"))
    assert [row["id"] for row in database.take_over()[0]] == ["job2"]


def test_an_image_that_is_damaged_is_not_read_and_is_healed_by_the_same_content(kept: Kept) -> None:
    images = ImageFolder(kept.folder / "images")
    data = bytes(range(256)) * 2000
    sha256 = hashlib.sha256(data).hexdigest()
    images.put(sha256, data, "me")
    checked = images.check(sha256)
    assert images.read(checked, 200_000, 100_000) == data[200_000:300_000]
    (path,) = (kept.folder / "images").glob("*/*")
    for damaged in (data[:-1], data[:250_000] + b"?" + data[250_001:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedImage):
            images.check(sha256)
        with pytest.raises(DamagedImage):  # also where it was good a moment ago
            images.read(checked, len(data) - 300_000, 300_000)
    images.put(sha256, data, "me")
    assert images.check(sha256) == checked


async def test_a_store_that_is_closed_says_that_the_server_stops(kept: Kept) -> None:
    store = await JobStore.open(None, kept.retention)
    await store.close()
    with pytest.raises(Draining) as told:
        await store.ended("me", "job1")
    assert told.value.retry_after_s is not None


async def test_a_job_that_cannot_be_read_is_its_own_trouble(kept: Kept) -> None:
    first = Database(kept.folder / "jobs.sqlite3", ImageFolder(kept.folder / "images"), kept.retention)
    for number in (1, 2):
        first.insert(_row(number, plan='{"prompts": "planted words"}'))
    first.finish(_end(2, kept))
    first.close()
    store = await JobStore.open(kept.folder, JobRetention(keep_s=1e10))
    assert await store.take_over() == ([], True)
    for job_id in ("job1", "job2"):
        with pytest.raises(JobDamaged) as told:
            await store.ended("me", job_id)
        assert "planted" not in told.value.message
        assert await store.ended("you", job_id) is None
    listed = await store.page("me", 9, before=None, since_us=None, states=None)
    assert [(job.id, type(job)) for job in listed] == [("job2", DamagedJob)]
    assert [job.id for job in store.unreadable_jobs()] == ["job1"]
    assert store.facts().damaged["row"] >= 3
    for job_id in ("job1", "job2"):
        assert await store.delete(job_id)
        assert await store.ended("me", job_id) is None
    await store.close()


def test_what_a_deleted_job_said_is_not_left_in_the_file(kept: Kept) -> None:
    words = "a fox that nobody else should hear of"
    database = kept.open()
    database.insert(_row(1, plan=f'{{"prompt": "{words}"}}'))
    assert database.finish(_end(1, kept))
    database.close()
    assert words.encode() in (kept.folder / "jobs.sqlite3").read_bytes()
    database = kept.open()
    assert database.delete("job1")
    database.close()
    for file in kept.folder.glob("jobs.sqlite3*"):
        assert words.encode() not in file.read_bytes()
