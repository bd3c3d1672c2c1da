"""Which files a start removes: those meant to go. All others are kept, and put back where they belong."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from chromarpc_server.domain.limits import JobRetention
from chromarpc_server.jobs.store import images
from chromarpc_server.jobs.store.database import Database
from chromarpc_server.jobs.store.images import ImageFolder, owners_noted
from chromarpc_server.jobs.store.rows import EndRow, NewRow
from chromarpc_server.jobs.store.sqlite_file import FILE

DATA = [f"image {number}".encode() * 20 for number in range(4)]
HASHES = [hashlib.sha256(data).hexdigest() for data in DATA]


def _open(folder: Path) -> Database:
    return Database(folder / FILE, ImageFolder(folder / "images"), JobRetention(keep_s=1e10))


def _finish(database: Database, number: int, *, named: bool = True) -> None:
    job = f"job{number}"
    database.insert(NewRow(job, "me", None, "f", 10**15 + number, "{}", True, False, "[]"))
    database.put_image(HASHES[number], DATA[number], "me")
    if named:
        end = EndRow(job, 10**15, "succeeded", 1, "[]", "[]", b"", [HASHES[number]], len(DATA[number]))
        assert database.finish(end)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*/*")}


def _places(*numbers: int) -> set[str]:
    return {f"{HASHES[number][:2]}/{HASHES[number]}" for number in numbers}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    database = _open(tmp_path)
    for number in range(3):
        _finish(database, number)
    database.close()
    return tmp_path


def test_images_beside_an_empty_database_are_kept_and_come_back_with_the_right_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = folder / "right"
    shutil.move(folder / FILE, right)
    with caplog.at_level(logging.ERROR):
        _open(folder).close()
    (told,) = [record for record in caplog.records if record.message == "store.images_unnamed"]
    assert told.__dict__["count"] == 3
    lost = {f"lost+found/{sha256}" for sha256 in HASHES[:3]}
    assert _files(folder) == lost
    caplog.clear()
    _open(folder).close()  # another start removes nothing either, and has nothing new to say
    assert _files(folder) == lost
    assert not caplog.records
    (folder / "images" / "lost+found" / HASHES[2]).write_bytes(b"damaged meanwhile")
    shutil.move(right, folder / FILE)
    database = _open(folder)
    assert _files(folder) == _places(0, 1) | {f"lost+found/{HASHES[2]}"}
    database.close()


def test_what_a_job_that_did_not_end_had_drawn_is_removed(folder: Path) -> None:
    database = _open(folder)
    _finish(database, 3, named=False)
    database.close()
    assert _files(folder) == _places(0, 1, 2, 3)
    _open(folder).close()
    assert _files(folder) == _places(0, 1, 2)


def test_an_image_of_a_deleted_job_goes_although_the_process_ended_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = _open(folder)
    monkeypatch.setattr(ImageFolder, "drop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        database.delete("job1")
    database.close()
    monkeypatch.undo()
    assert _files(folder) == _places(0, 1, 2)
    _open(folder).close()
    assert _files(folder) == _places(0, 2)


def test_an_intent_costs_no_image_that_another_job_names(folder: Path) -> None:
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute("INSERT INTO image_intents VALUES (?)", (HASHES[0],))
    connection.close()
    _open(folder).close()
    assert _files(folder) == _places(0, 1, 2)


def test_a_file_says_whom_it_was_drawn_for(folder: Path) -> None:
    path = folder / "images" / HASHES[0][:2] / HASHES[0]
    if owners_noted(path) is None:
        pytest.skip("this file system keeps no extended attributes")
    database = _open(folder)
    database.put_image(HASHES[0], DATA[0], "you")
    database.close()
    assert owners_noted(path) == {"me", "you"}


def test_the_log_is_empty_once_a_job_is_deleted(folder: Path) -> None:
    database = _open(folder)
    database.insert(NewRow("job9", "me", None, "f", 10**15, '{"prompt":"a fox"}', True, False, "[]"))
    assert database.finish(EndRow("job9", 10**15, "failed", 0, "[]", "[]", b"", [], 0))
    log = folder / f"{FILE}-wal"
    assert b"a fox" in log.read_bytes()
    assert database.delete("job9")
    assert log.stat().st_size == 0
    assert b"a fox" not in (folder / FILE).read_bytes()
    database.close()


def test_a_reader_beside_the_server_keeps_nobody_waiting(folder: Path) -> None:
    database = _open(folder)
    with closing(sqlite3.connect(folder / FILE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM jobs").fetchone() == (3,)
        begun = time.monotonic()
        assert database.delete("job1")
        assert time.monotonic() - begun < 2  # SQLite would wait for 5 s for the reader to end
    database.tend()
    assert database.log_bytes == 0
    database.close()


def test_what_is_set_aside_is_there_after_a_power_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / FILE).unlink()
    synced: list[Path] = []
    monkeypatch.setattr(images, "sync_folder", synced.append)
    _open(folder).close()
    # The name of lost+found itself, and the names in it.
    assert {folder / "images", folder / "images" / "lost+found"} <= set(synced)


def test_a_damaged_file_takes_no_good_one_s_place_in_lost_and_found(folder: Path) -> None:
    (folder / FILE).unlink()
    _open(folder).close()  # all are set aside, and good
    place = folder / "images" / HASHES[0][:2] / HASHES[0]
    place.write_bytes(b"another time, and rotten")
    _open(folder).close()
    lost = folder / "images" / "lost+found"
    assert (lost / HASHES[0]).read_bytes() == DATA[0]
    assert len(list(lost.glob(f"{HASHES[0]}.damaged-*"))) == 1


def test_a_file_that_cannot_be_removed_is_tried_again_rather_than_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = _open(folder)
    unlink = Path.unlink

    def fails(path: Path, missing_ok: bool = False) -> None:
        if path.name == HASHES[1]:
            raise OSError(5, "Input/output error")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", fails)
    assert database.delete("job1")
    database.close()
    _open(folder).close()
    assert _files(folder) == _places(0, 1, 2)
    monkeypatch.undo()
    _open(folder).close()
    assert _files(folder) == _places(0, 2)
