"""A backup is whole or says what it lacks; what is restored from it is what was there."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.maintenance import backup as module
from chromarpc_server.maintenance.layout import DataFolder
from chromarpc_server.maintenance.report import Report
from tests.conftest import RunningServer
from tests.maintenance.conftest import ALICE, BOB, FETCHED, OWN, SHARED, TOKENS, Filled, flip_bit, sha256_of

Store = Callable[..., tuple[int, dict[str, Any]]]
Serve = Callable[..., RunningServer]


def _files(folder: DataFolder) -> dict[str, bytes]:
    areas = (folder.images, folder.loras, folder.downloads)
    return {
        folder.name_of(path): path.read_bytes() for area in areas for path in area.rglob("*") if path.is_file()
    }


def _modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))}


def test_a_backup_has_everything_and_is_for_its_user_alone(store: Store, filled: Filled, tmp_path: Path) -> None:
    os.setxattr(next(filled.folder.image_files()), "user.chromarpc.owner", ALICE.encode())
    code, told = store("backup", tmp_path / "saved")
    assert (code, told["problems"]) == (0, [])
    saved = DataFolder(tmp_path / "saved")
    assert _files(saved) == _files(filled.folder)
    assert _modes(saved.root) == {0}
    assert sorted(path.name for path in saved.root.iterdir()) == ["downloads", "jobs", "loras", "manifest.json"]
    assert [path.name for path in saved.jobs.iterdir() if path.is_file()] == ["jobs.sqlite3"]
    image = next(filled.folder.image_files())
    copy = saved.image(image.name)
    assert os.getxattr(copy, "user.chromarpc.owner") == ALICE.encode()
    upload = filled.folder.loras / f"{sha256_of(OWN)}.safetensors"
    assert (saved.loras / upload.name).stat().st_mtime_ns == upload.stat().st_mtime_ns
    manifest = json.loads((saved.root / "manifest.json").read_text())
    assert manifest["counts"]["jobs"] == 6
    assert manifest["database_sha256"] == sha256_of(saved.database)
    # A backup is laid out as a data folder is, so that it can be checked as one.
    assert store("check", data_dir=saved.root)[0] == 0
    code, told = store("backup", tmp_path / "saved")
    assert code == 1
    assert "is there already" in told["error"]


def test_a_backup_s_folder_may_be_there_and_empty(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    monkeypatch.chdir(tmp_path / "saved")
    assert store("backup", ".")[0] == 0
    assert (tmp_path / "saved" / "manifest.json").exists()
    (tmp_path / "other.part").mkdir()
    code, told = store("backup", tmp_path / "other")
    assert code == 1
    assert "remove it if that one was killed" in told["error"]


def test_downloads_can_be_left_out(store: Store, tmp_path: Path) -> None:
    assert store("backup", tmp_path / "saved", "--without-downloads")[0] == 0
    assert list((tmp_path / "saved" / "downloads").iterdir()) == []
    assert len(list((tmp_path / "saved" / "loras").iterdir())) == 4


def test_damaged_files_are_named_and_left_out_and_the_rest_is_saved(
    store: Store, filled: Filled, tmp_path: Path
) -> None:
    image = next(filled.folder.image_files())
    upload = filled.folder.loras / f"{sha256_of(OWN)}.safetensors"
    note = filled.folder.loras / f"{sha256_of(SHARED)}.json"
    for path in (image, upload):
        flip_bit(path)
    note.write_text("{")
    code, told = store("backup", tmp_path / "saved")
    assert code == 1
    names = {filled.folder.name_of(path) for path in (image, upload, note)}
    assert {problem["subject"] for problem in told["problems"]} == names
    saved = DataFolder(tmp_path / "saved")
    assert _files(saved).keys() == _files(filled.folder).keys() - names - {f"loras/{sha256_of(OWN)}.json"}
    # What the backup lacks, and says so, keeps nobody from restoring it.
    assert store("restore", saved.root, data_dir=tmp_path / "new")[0] == 0


def test_a_backup_that_fails_leaves_nothing(
    store: Store, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(module, "copy_whole", no_room)
    code, told = store("backup", tmp_path / "saved")
    assert (code, told["error"]) == (1, "somewhere: No space left on device: see to it, then run this again")
    assert not list(tmp_path.glob("saved*"))


def test_jobs_that_are_deleted_meanwhile_are_not_in_it(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose image went before it was copied, and one whose image was copied before it went."""
    early, late = filled.ended[ALICE][0], filled.ended[BOB][1]
    real = module.copy_whole

    def delete(job_id: str) -> None:
        with sqlite3.connect(filled.folder.database) as database:
            database.execute("PRAGMA foreign_keys = ON")
            images = database.execute("SELECT sha256 FROM images WHERE job = ?", (job_id,)).fetchall()
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        database.close()
        for (sha256,) in images:
            filled.folder.image(sha256).unlink()

    copied: list[Path] = []

    def copy(source: Path, *rest: Any) -> str:
        if not copied:
            delete(early)
        copied.append(source)
        return real(source, *rest)

    monkeypatch.setattr(module, "copy_whole", copy)
    snapshot = module._snapshot
    taken: list[Path] = []

    def snapshot_then_delete(live: sqlite3.Connection, target: Path) -> None:
        snapshot(live, target)
        taken.append(target)
        if len(taken) == 2:
            delete(late)

    monkeypatch.setattr(module, "_snapshot", snapshot_then_delete)
    report = Report()
    module.backup(filled.folder, tmp_path / "saved", report)
    assert report.problems == []
    assert len(taken) == 2
    saved = DataFolder(tmp_path / "saved")
    with sqlite3.connect(saved.database) as database:
        ids = {job for (job,) in database.execute("SELECT id FROM jobs")}
        named = {sha256 for (sha256,) in database.execute("SELECT sha256 FROM images")}
    database.close()
    assert {early, late} & ids == set()
    assert len(ids) == 4
    assert {path.name for path in saved.image_files()} == named


def test_what_is_restored_serves_as_before(store: Store, filled: Filled, serve: Serve, tmp_path: Path) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    before = _files(filled.folder)
    filled.root.rename(tmp_path / "destroyed")
    code, told = store("restore", tmp_path / "saved")
    assert (code, told["problems"]) == (0, [])
    assert _files(filled.folder) == before
    assert _modes(filled.root) == {0}
    assert not (filled.root / "restore.part").exists()
    server = serve(**filled.settings)
    with (
        chromarpc.Client(server.target, token=TOKENS[ALICE]) as alice,
        chromarpc.Client(server.target, token=TOKENS[BOB]) as bob,
    ):
        for client, name in ((alice, ALICE), (bob, BOB)):
            for job_id in filled.ended[name]:
                (image,) = client.get_job(job_id).images
                assert before[f"jobs/images/{image.sha256[:2]}/{image.sha256}"] == client.get_image_bytes(job_id)
        alice.cancel_job(filled.waiting[ALICE])
        # It waited with an upload, whose file has another inode now.
        assert isinstance(list(bob.watch_job(filled.waiting[BOB]))[-1], chromarpc.Completed)
        assert {lora.sha256 for lora in alice.list_loras()} == {*map(sha256_of, (OWN, SHARED, FETCHED))}
        assert {lora.sha256 for lora in bob.list_loras()} == {sha256_of(SHARED)}


def test_a_store_is_never_overwritten(store: Store, filled: Filled, tmp_path: Path) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    code, told = store("restore", tmp_path / "saved")
    assert code == 1
    assert "has a store already" in told["error"]
    (filled.root / "uploads").mkdir(exist_ok=True)
    (filled.root / "uploads" / "one.part").write_bytes(b"half")
    before = _files(filled.folder)
    code, told = store("restore", tmp_path / "saved", "--replace")
    assert code == 0
    (replaced,) = (filled.root / "quarantine").iterdir()
    assert _files(DataFolder(replaced)) == before
    assert (replaced / "jobs" / "jobs.sqlite3").exists()
    assert (replaced / "uploads" / "one.part").exists()
    assert store("check")[0] == 0


@pytest.mark.parametrize("what", ["database", "manifest", "image", "upload", "note", "nothing there"])
def test_a_damaged_backup_changes_nothing(store: Store, filled: Filled, tmp_path: Path, what: str) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    saved, new = DataFolder(tmp_path / "saved"), tmp_path / "new"
    damaged = {
        "database": saved.database,
        "manifest": saved.root / "manifest.json",
        "image": next(saved.image_files()),
        "upload": saved.loras / f"{sha256_of(OWN)}.safetensors",
        "note": saved.loras / f"{sha256_of(OWN)}.json",
        "nothing there": None,
    }[what]
    if damaged is None:
        saved = DataFolder(tmp_path)
    else:
        flip_bit(damaged)
    code, told = store("restore", saved.root, data_dir=new)
    assert code == 1
    assert not DataFolder(new).has_store()
    if what in ("image", "upload", "note"):
        assert damaged is not None
        assert told["problems"][0]["subject"] == saved.name_of(damaged)
        # Named once more, and left out.
        code, told = store("restore", saved.root, "--partial", data_dir=new)
        assert code == 1
        assert DataFolder(new).has_store()
        assert not (new / saved.name_of(damaged)).exists()
    else:
        assert "backup" in told["error"]


def test_a_store_in_use_is_not_touched(store: Store, filled: Filled, tmp_path: Path) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    lock = StoreLock(filled.folder.jobs)
    lock.acquire()
    code, told = store("restore", tmp_path / "saved", "--replace")
    lock.release()
    assert code == 1
    assert "in use by another process: stop that one" in told["error"]
    assert not filled.folder.quarantine.exists()
