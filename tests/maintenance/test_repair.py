"""`chromarpc-server store repair`: whatever was damaged, a server starts afterwards, and nothing is deleted."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.jobs.store.schema import MIGRATIONS
from chromarpc_server.maintenance import repair as module
from chromarpc_server.maintenance.salvage import salvage
from tests.conftest import RunningServer
from tests.maintenance.conftest import (
    ALICE,
    BOB,
    FETCHED,
    OWN,
    SHARED,
    TOKENS,
    Filled,
    copy_job,
    flip_bit,
    sha256_of,
)

Store = Callable[..., tuple[int, dict[str, Any]]]
Serve = Callable[..., RunningServer]


def _image_of(filled: Filled, job_id: str) -> Path:
    with closing(sqlite3.connect(filled.folder.database)) as database:
        (sha256,) = database.execute("SELECT sha256 FROM images WHERE job = ?", (job_id,)).fetchone()
    return filled.folder.image(sha256)


def _jobs(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return sorted(job for (job,) in database.execute("SELECT id FROM jobs"))


def _all(filled: Filled) -> list[str]:
    return sorted([*filled.ended[ALICE], *filled.ended[BOB], *filled.waiting.values()])


def _quarantined(filled: Filled) -> dict[str, bytes]:
    folder = filled.folder.quarantine
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_is_nothing_to_do_in_a_whole_store(store: Store, filled: Filled) -> None:
    assert store("repair") == (0, {**store("repair")[1], "done": [], "problems": []})
    assert not filled.folder.quarantine.exists()
    assert _jobs(filled.folder.database) == _all(filled)


def test_damaged_files_go_to_quarantine_and_lost_ones_come_back(store: Store, filled: Filled) -> None:
    folder = filled.folder
    damaged, lost = _image_of(filled, filled.ended[ALICE][0]), _image_of(filled, filled.ended[BOB][1])
    upload, note = folder.loras / f"{sha256_of(OWN)}.safetensors", folder.loras / f"{sha256_of(SHARED)}.json"
    for path, where in ((damaged, 0.5), (upload, 0.5), (note, 0)):
        flip_bit(path, where)
    kept = {path.name: path.read_bytes() for path in (damaged, upload, note)}
    good = lost.read_bytes()
    folder.lost_and_found.mkdir(exist_ok=True)
    lost.rename(folder.lost_and_found / lost.name)
    for half in (folder.images / "ab" / "cut.part", folder.uploads / "cut.part", folder.downloads / "cut.part"):
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(b"half")
    code, told = store("repair")
    assert code == 0
    assert lost.read_bytes() == good
    assert _quarantined(filled) == {
        f"jobs/images/{damaged.name}": kept[damaged.name],
        f"loras/{upload.name}": kept[upload.name],
        f"loras/{sha256_of(OWN)}.json": _quarantined(filled)[f"loras/{sha256_of(OWN)}.json"],
        f"loras/{note.name}": kept[note.name],
    }
    assert not list(filled.root.rglob("*.part"))
    assert any("RedrawJob" in line and filled.ended[ALICE][0] in line for line in told["done"])
    # What cannot be repaired is still a problem; the rest is none.
    left = {problem["subject"] for problem in store("check")[1]["problems"]}
    assert left == {folder.name_of(damaged), f"loras/{note.name}"}
    again = store("repair")[1]["done"]
    assert [line.startswith("left: ") for line in again] == [True]


def _cut_in_half(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def _lose_header(database: Path) -> None:
    with database.open("r+b") as file:
        file.write(os.urandom(100))


def _lose_first_page(database: Path) -> None:
    with database.open("r+b") as file:
        file.write(os.urandom(4096))


def _lose_an_index(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'jobs_by_owner'").fetchone()
    with database.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


@pytest.mark.parametrize(
    ("damage", "keeps_all"),
    [(_cut_in_half, False), (_lose_header, True), (_lose_first_page, True), (_lose_an_index, True)],
)
def test_a_damaged_database_is_rebuilt_from_what_can_be_read(
    store: Store, filled: Filled, serve: Serve, damage: Callable[[Path], None], keeps_all: bool
) -> None:
    before = len(list(filled.folder.image_files()))
    damage(filled.folder.database)
    damaged = filled.folder.database.read_bytes()
    assert store("check")[0] == 1
    code, told = store("repair")
    assert code == 0, told
    assert any("rebuilt the database" in line for line in told["done"])
    saved = _jobs(filled.folder.database)
    assert set(saved) <= set(_all(filled))
    assert not keeps_all or saved == _all(filled)
    (kept,) = (data for name, data in _quarantined(filled).items() if name.endswith("/jobs.sqlite3"))
    assert kept == damaged
    assert filled.folder.database.stat().st_mode & 0o777 == 0o600
    lost = len(list(filled.folder.lost_and_found.glob("*")))
    assert len(list(filled.folder.image_files())) + lost == before
    assert store("check")[0] == 0
    assert store("repair")[1]["done"] == []
    server = serve(**filled.settings)
    with chromarpc.Client(server.target, token=TOKENS[ALICE]) as alice:
        for job_id in set(filled.ended[ALICE]) & set(saved):
            assert len(alice.get_image_bytes(job_id)) > 100


def test_every_other_row_is_saved_where_pages_are_damaged(filled: Filled, tmp_path: Path) -> None:
    """Pages in the middle of a large table and of its indexes."""
    path, many = tmp_path / "jobs.sqlite3", 2000
    shutil.copy(filled.folder.database, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN")
        for number in range(many):
            copy_job(database, filled.waiting[ALICE], id=f"copy{number}")
        database.execute("COMMIT")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = path.stat().st_size // 4096
    with path.open("r+b") as file:
        for page in (pages // 3, pages // 2, pages - 2):
            file.seek(page * 4096)
            file.write(os.urandom(4096))
    found = salvage(path, tmp_path / "saved.sqlite3")
    saved = _jobs(tmp_path / "saved.sqlite3")
    assert len(saved) == found.jobs
    assert many - 60 <= len(saved) < many + len(_all(filled))
    with closing(sqlite3.connect(tmp_path / "saved.sqlite3")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_database_beyond_help_is_kept_and_an_empty_one_starts(
    store: Store, filled: Filled, serve: Serve
) -> None:
    filled.folder.database.write_bytes(b"this was a database once" * 1000)
    images = {path.name for path in filled.folder.image_files()}
    assert store("repair")[0] == 0
    assert _jobs(filled.folder.database) == []
    assert {path.name for path in filled.folder.lost_and_found.iterdir()} == images
    assert store("check")[0] == 0
    serve(**filled.settings)


def test_a_row_that_cannot_be_read_is_kept_in_a_file(store: Store, filled: Filled, serve: Serve) -> None:
    job_id = filled.waiting[BOB]
    with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as database:
        database.execute("UPDATE jobs SET plan = replace(plan, '{', '[') WHERE id = ?", (job_id,))
    code, told = store("repair")
    assert code == 0
    assert any(f"moved the job {job_id}" in line for line in told["done"])
    ((name, data),) = _quarantined(filled).items()
    assert name.startswith("jobs/rows/")
    assert job_id.encode() in data
    assert store("check")[0] == 0
    serve(**filled.settings)


@pytest.mark.parametrize("point", ["_keep_damaged", "sync_folder", "move_aside"])
def test_a_repair_that_was_cut_is_run_again(
    store: Store, filled: Filled, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    _lose_header(filled.folder.database)
    flip_bit(_image_of_any(filled))
    damaged = filled.folder.database.read_bytes()
    real = getattr(module, point)
    calls = 0

    def cut(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, point, cut)
    with pytest.raises(KeyboardInterrupt):
        module.repair(filled.folder, module.Report())
    assert store("repair")[0] == 0
    assert _jobs(filled.folder.database) == _all(filled)
    kept = [data for name, data in _quarantined(filled).items() if name.endswith("/jobs.sqlite3")]
    assert kept == [damaged]
    assert not list(filled.folder.jobs.glob("jobs.sqlite3.*"))


def _image_of_any(filled: Filled) -> Path:
    return next(filled.folder.image_files())


def test_what_the_write_ahead_log_has_is_saved_too(store: Store, filled: Filled, tmp_path: Path) -> None:
    """As after a crash: the newest job is in the log alone."""
    database = filled.folder.database
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        copy_job(writer, filled.waiting[ALICE], id="in-the-log")
        for suffix in ("", "-wal"):
            shutil.copy(f"{database}{suffix}", tmp_path / f"crashed{suffix}")
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"crashed{suffix}", f"{database}{suffix}")
    _lose_an_index_in_place(database)
    assert store("repair")[0] == 0
    assert _jobs(database) == sorted([*_all(filled), "in-the-log"])
    assert not Path(f"{database}-wal").exists()


def _lose_an_index_in_place(database: Path) -> None:
    """Without opening it, which would empty its log."""
    with database.open("r+b") as file:
        data = file.read()
        for page in range(1, len(data) // 4096):
            if data[page * 4096] == 10:  # a leaf of an index
                file.seek(page * 4096)
                file.write(b"\xff" * 4096)
                return


def test_a_store_in_use_or_of_a_newer_version_is_not_touched(store: Store, filled: Filled) -> None:
    lock = StoreLock(filled.folder.jobs)
    lock.acquire()
    code, told = store("repair")
    lock.release()
    assert code == 1
    assert "in use by another process" in told["error"]
    with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as database:
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    for tool in ("repair", "check"):
        code, told = store(tool)
        assert code == 1
        assert "was written by a newer chromarpc" in told["error"]
    assert not filled.folder.quarantine.exists()


def test_downloads_are_moved_too(store: Store, filled: Filled) -> None:
    path = filled.folder.downloads / f"{sha256_of(FETCHED)}.safetensors"
    flip_bit(path)
    assert store("repair")[0] == 0
    assert not path.exists()
    assert len(_quarantined(filled)) == 2
    assert store("check")[0] == 0
