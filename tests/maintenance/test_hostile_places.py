"""Tools that were cut, or are given odd folders and odd backups: nothing is destroyed, and a sentence says why."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.maintenance import forget as forgetting
from chromarpc_server.maintenance import manifest as manifests
from chromarpc_server.maintenance import restore as restoring
from chromarpc_server.maintenance.layout import DataFolder
from chromarpc_server.maintenance.report import Report
from tests.maintenance.conftest import ALICE, BOB, OWN, SECRET, Filled, copy_job, flip_bit, sha256_of

Store = Callable[..., tuple[int, dict[str, Any]]]


def _bytes_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def _lose_header(database: Path) -> None:
    with database.open("r+b") as file:
        file.write(b"\xff" * 100)


def test_a_repair_that_was_killed_while_it_read_the_damaged_database_is_run_again(
    store: Store, filled: Filled
) -> None:
    _lose_header(filled.folder.database)
    left = filled.folder.jobs / "jobs.sqlite3.rebuilt.part.source"
    left.mkdir(mode=0o700)
    (left / "jobs.sqlite3").write_bytes(b"half of a copy")
    assert store("repair")[0] == 0
    assert not list(filled.folder.jobs.glob("jobs.sqlite3.*"))
    assert store("check")[0] == 0


def test_a_row_in_quarantine_is_never_overwritten(store: Store, filled: Filled) -> None:
    """Another database, after a restore, counts its rows from the same number."""
    rows = filled.folder.quarantine / "jobs" / "rows"
    for number, text in enumerate(("first", "second"), 1):
        with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as database:
            database.execute("UPDATE jobs SET plan = ? WHERE number = 1", (text,))
            row = database.execute("SELECT * FROM jobs WHERE number = 1").fetchone()
        assert store("repair")[0] == 0
        assert len(list(rows.iterdir())) == number
        with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as database:
            database.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
    assert sorted(json.loads(path.read_bytes())["plan"] for path in rows.iterdir()) == ["first", "second"]


def test_a_good_image_in_lost_and_found_is_not_replaced_by_a_damaged_one(store: Store, filled: Filled) -> None:
    folder = filled.folder
    (sha256,) = _images_of(filled, filled.ended[ALICE][0])
    path, lost = folder.image(sha256), folder.lost_and_found / sha256
    good = path.read_bytes()
    folder.lost_and_found.mkdir(exist_ok=True)
    lost.write_bytes(good)
    flip_bit(path)
    damaged = path.read_bytes()
    with closing(sqlite3.connect(folder.database, isolation_level=None)) as database:
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("DELETE FROM jobs WHERE id = ?", (filled.ended[ALICE][0],))
    assert store("repair")[0] == 0
    assert lost.read_bytes() == good
    assert damaged in [kept.read_bytes() for kept in folder.quarantine.rglob("*") if kept.is_file()]


def _images_of(filled: Filled, job_id: str) -> list[str]:
    with closing(sqlite3.connect(filled.folder.database)) as database:
        return [sha256 for (sha256,) in database.execute("SELECT sha256 FROM images WHERE job = ?", (job_id,))]


@pytest.mark.parametrize("below", ["saved", "quarantine/saved", "jobs/images/lost+found/saved", "loras/a/saved"])
def test_a_backup_is_not_made_within_what_it_is_of(store: Store, filled: Filled, below: str) -> None:
    before = sorted(filled.root.rglob("*"))
    code, told = store("backup", filled.root / below)
    assert code == 1
    assert "outside" in told["error"]
    assert sorted(filled.root.rglob("*")) == before


def test_a_backup_through_a_link_lies_where_the_link_leads(store: Store, tmp_path: Path) -> None:
    (tmp_path / "disk" / "tonight").mkdir(parents=True)
    (tmp_path / "saved").symlink_to(tmp_path / "disk" / "tonight")
    assert store("backup", tmp_path / "saved")[0] == 0
    assert (tmp_path / "disk" / "tonight" / "manifest.json").exists()
    assert (tmp_path / "saved").is_symlink()


@pytest.mark.parametrize("moved", range(5))
def test_a_restore_that_was_cut_loses_nothing_of_the_store_it_replaces(
    store: Store, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """As after a crash: what the newest job wrote is in SQLite's log alone."""
    assert store("backup", tmp_path / "saved")[0] == 0
    _leave_in_the_log(filled, tmp_path, "in-the-log")
    real, calls = restoring.move_aside, 0

    def cut(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > moved:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(restoring, "move_aside", cut)
    with pytest.raises(KeyboardInterrupt):
        restoring.restore(filled.folder, tmp_path / "saved", Report(), replaces=True)
    monkeypatch.undo()
    assert store("restore", tmp_path / "saved", "--replace")[0] == 0
    assert store("check")[0] == 0
    (kept,) = filled.folder.quarantine.rglob("jobs.sqlite3")
    with closing(sqlite3.connect(kept)) as database:
        assert ("in-the-log",) in list(database.execute("SELECT id FROM jobs"))


def _leave_in_the_log(filled: Filled, tmp_path: Path, job_id: str) -> None:
    files = [filled.folder.jobs / f"jobs.sqlite3{suffix}" for suffix in ("", "-wal")]
    with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        copy_job(writer, filled.waiting[ALICE], id=job_id)
        for path in files:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in files:
        path.write_bytes((tmp_path / path.name).read_bytes())


def test_a_place_that_cannot_be_taken_is_seen_before_anything_is_moved(
    store: Store, filled: Filled, tmp_path: Path
) -> None:
    """A folder on another disk, as containers mount them, cannot be moved; a link cannot be put in its place."""
    assert store("backup", tmp_path / "saved")[0] == 0
    elsewhere = tmp_path / "other disk"
    filled.folder.downloads.rename(elsewhere)
    filled.folder.downloads.symlink_to(elsewhere)
    before = sorted(filled.root.rglob("*"))
    code, told = store("restore", tmp_path / "saved", "--replace")
    assert code == 1
    assert str(filled.folder.downloads) in told["error"]
    assert sorted(filled.root.rglob("*")) == before


def _forge(saved: DataFolder, **changes: Any) -> None:
    """A manifest that says something else, and vouches for itself."""
    path = saved.root / manifests.FILE
    values = {**json.loads(path.read_bytes()), **changes}
    values = {key: value for key, value in values.items() if value is not None and key != "sha256"}
    path.write_text(json.dumps({**values, "sha256": manifests._checksum(values)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": {"/etc/hostname": "0" * 64}},
        {"notes": {"../outside": "0" * 64}},
        {"notes": ["loras"]},
        {"schema": None},
        {"format": None},
        {"format": "1"},
        {"colour": "blue"},
        {"left_out": 5},
        {"database_sha256": ""},
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused_in_a_sentence(store: Store, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    _forge(DataFolder(tmp_path / "saved"), **changes)
    code, told = store("restore", tmp_path / "saved", data_dir=tmp_path / "new")
    assert code == 1
    assert "manifest.json" in told["error"]
    assert not DataFolder(tmp_path / "new").has_store()


@pytest.mark.parametrize("what", ["a pipe", "an endless file", "a link"])
def test_only_files_are_taken_from_a_backup(store: Store, tmp_path: Path, what: str) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    upload = DataFolder(tmp_path / "saved").loras / f"{sha256_of(OWN)}.safetensors"
    upload.unlink()
    if what == "a pipe":
        os.mkfifo(upload)
    else:
        upload.symlink_to("/dev/zero" if what == "an endless file" else OWN)
    code, told = store("restore", tmp_path / "saved", data_dir=tmp_path / "new")
    assert code == 1
    assert told["problems"][0]["subject"] == f"loras/{upload.name}"
    assert store("restore", tmp_path / "saved", "--partial", data_dir=tmp_path / "new")[0] == 1
    assert not (tmp_path / "new" / "loras" / upload.name).exists()


@pytest.mark.parametrize("what", ["database", "note"])
def test_what_rots_between_two_looks_is_not_restored(
    store: Store, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    saved, real = DataFolder(tmp_path / "saved"), restoring.verify
    rotten = saved.database if what == "database" else saved.loras / f"{sha256_of(OWN)}.json"

    def verify(*arguments: Any) -> None:
        real(*arguments)
        flip_bit(rotten)

    monkeypatch.setattr(restoring, "verify", verify)
    code, told = store("restore", tmp_path / "saved", data_dir=tmp_path / "new")
    assert code == 1
    assert rotten.name in told["error"]
    assert not DataFolder(tmp_path / "new").has_store()


def test_a_replaced_store_is_not_removed_because_the_disk_is_full(
    store: Store, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    assert store("restore", tmp_path / "saved", "--replace")[0] == 0
    (replaced,) = filled.folder.quarantine.iterdir()
    real = forgetting._wipe_rows

    def full(path: Path, *arguments: Any) -> Any:
        if path.is_relative_to(replaced):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return real(path, *arguments)

    monkeypatch.setattr(forgetting, "_wipe_rows", full)
    code, told = store("forget", "--caller", BOB)
    assert code == 1
    assert "disk is full" in told["error"]
    assert "damaged" not in told["error"]
    assert DataFolder(replaced).database.exists()


def test_what_other_tools_left_half_done_is_forgotten_too(store: Store, filled: Filled) -> None:
    text = f"{SECRET} of {ALICE}".encode()
    for left in (
        filled.root / "restore.part" / "jobs" / "jobs.sqlite3",
        filled.folder.jobs / "jobs.sqlite3.rebuilt.part.source" / "jobs.sqlite3",
        filled.folder.jobs / "jobs.sqlite3.rebuilt",
        filled.folder.jobs / "jobs.sqlite3.rebuilt.part",
    ):
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(text)
    assert store("forget", "--caller", ALICE)[0] == 0
    assert SECRET.encode() not in _bytes_below(filled.root)


def test_an_image_that_others_name_does_not_become_nobody_s(store: Store, filled: Filled) -> None:
    (sha256,) = _images_of(filled, filled.ended[BOB][1])
    path = filled.folder.image(sha256)
    os.setxattr(path, "user.chromarpc.owner", ALICE.encode())
    assert store("forget", "--caller", ALICE)[0] == 0
    assert "user.chromarpc.owner" not in os.listxattr(path)
