"""`chromarpc-server store forget`: nothing of a caller is left below the data folder, nothing of others goes."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc_server.__main__ import main
from chromarpc_server.jobs.store.images import OWNER_ATTRIBUTE
from chromarpc_server.jobs.store.lock import StoreLock
from tests.conftest import RunningServer
from tests.maintenance.conftest import (
    ALICE,
    BOB,
    FETCHED,
    OWN,
    SECRET,
    SHARED,
    TOKENS,
    Filled,
    copy_job,
    sha256_of,
)

Store = Callable[..., tuple[int, dict[str, Any]]]
Serve = Callable[..., RunningServer]


def _bytes_below(folder: Path) -> bytes:
    """Of every file, with its name and its extended attributes."""
    parts = []
    for path in folder.rglob("*"):
        parts.append(os.fsencode(path))
        with suppress(OSError):
            parts += [os.getxattr(path, name) for name in os.listxattr(path)]
        if path.is_file():
            parts.append(path.read_bytes())
    return b"\n".join(parts)


def _images_of(filled: Filled, caller: str) -> set[str]:
    with closing(sqlite3.connect(filled.folder.database)) as database:
        query = "SELECT sha256 FROM images JOIN jobs ON job = id WHERE owner = ?"
        return {sha256 for (sha256,) in database.execute(query, (caller,))}


def test_no_byte_of_a_caller_is_left_and_others_keep_theirs(store: Store, filled: Filled, serve: Serve) -> None:
    folder = filled.folder
    own, others = _images_of(filled, ALICE) - _images_of(filled, BOB), _images_of(filled, BOB)
    for sha256 in own | others:
        owners = [name for name in (ALICE, BOB) if sha256 in _images_of(filled, name)]
        os.setxattr(folder.image(sha256), OWNER_ATTRIBUTE, "\n".join(owners).encode())
    folder.lost_and_found.mkdir(exist_ok=True)
    folder.uploads.mkdir(exist_ok=True)
    (folder.uploads / "unfinished.part").write_bytes(ALICE.encode())
    kept = folder.quarantine / "jobs" / "images"
    kept.mkdir(parents=True)
    for name, data, owner in (
        ("1" * 64, SECRET.encode(), ALICE), ("2" * 64, SECRET.encode(), None), ("3" * 64, b"bob's", BOB)
    ):  # fmt: skip
        for path in (folder.lost_and_found / name, kept / name):
            path.write_bytes(data)
            if owner is not None:
                os.setxattr(path, OWNER_ATTRIBUTE, owner.encode())
    (folder.quarantine / "jobs" / "damaged-1").mkdir()
    shutil.copy(folder.database, folder.quarantine / "jobs" / "damaged-1" / "jobs.sqlite3")
    rows = folder.quarantine / "jobs" / "rows"
    rows.mkdir()
    for number, owner in enumerate((ALICE, BOB)):
        (rows / f"{number}.json").write_text(
            f'{{"owner": "{owner}", "plan": "{SECRET if owner == ALICE else ""}"}}'
        )
    assert SECRET.encode() in _bytes_below(filled.root)
    code, told = store("forget", "--caller", ALICE)
    assert (code, told["problems"]) == (0, [])
    left = _bytes_below(filled.root)
    assert SECRET.encode() not in left
    assert ALICE.encode() not in left
    assert told["counts"] == {
        "removed: jobs": 3,
        "removed: images": len(own),
        "removed: uploads": 2,
        "removed: downloads": 1,
        "removed: lost+found": 2,
        "removed: quarantine": 4,
        "files among these whose owner is not known": 3,
    }
    assert any("backups" in line and "audit log" in line for line in told["done"])
    assert {path.name for path in folder.image_files()} == others
    assert [path.name for path in folder.lost_and_found.iterdir()] == ["3" * 64]
    assert sorted(path.name for path in folder.quarantine.rglob("*") if path.is_file()) == ["1.json", "3" * 64]
    assert sorted(path.name for path in folder.loras.iterdir()) == [
        f"{sha256_of(SHARED)}{suffix}" for suffix in (".json", ".safetensors")
    ]
    assert not list(folder.downloads.glob("*.*"))
    assert store("check")[0] == 0
    again = store("forget", "--caller", ALICE)[1]["counts"]
    assert set(again.values()) == {0}
    server = serve(**filled.settings)
    with (
        chromarpc.Client(server.target, token=TOKENS[ALICE]) as alice,
        chromarpc.Client(server.target, token=TOKENS[BOB]) as bob,
    ):
        assert not alice.list_jobs()
        assert not list(alice.list_loras())
        assert len(bob.list_jobs()) == 3
        assert all(len(bob.get_image_bytes(job_id)) > 100 for job_id in filled.ended[BOB])


def test_a_store_that_another_took_the_place_of_is_wiped_too(store: Store, filled: Filled, tmp_path: Path) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    assert store("restore", tmp_path / "saved", "--replace")[0] == 0
    assert _bytes_below(filled.folder.quarantine).count(SECRET.encode()) > 0
    assert store("forget", "--caller", ALICE)[0] == 0
    left = _bytes_below(filled.root)
    assert SECRET.encode() not in left
    assert ALICE.encode() not in left
    (replaced,) = filled.folder.quarantine.iterdir()
    assert (replaced / "loras" / f"{sha256_of(SHARED)}.safetensors").exists()
    # A damaged one of these goes as a whole, for nobody can say what is left in it.
    (replaced / "jobs" / "jobs.sqlite3").write_bytes(b"damaged" * 1000)
    assert store("forget", "--caller", ALICE)[0] == 0
    assert not (replaced / "jobs" / "jobs.sqlite3").exists()


def test_the_one_caller_of_a_server_without_a_callers_file(store: Store, filled: Filled, serve: Serve) -> None:
    with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as database:
        for number in range(2):
            copy_job(database, filled.waiting[ALICE], id=f"copy{number}", owner="")
    with pytest.raises(SystemExit) as refused:  # it may be a variable that is not set
        main(["store", "forget", "--caller", "", "--data-dir", str(filled.root)])
    assert refused.value.code == 2
    for count in (2, 0):
        code, told = store("forget", "--nobody")
        assert (code, told["counts"]["removed: jobs"]) == (0, count)
    assert SECRET.encode() in _bytes_below(filled.root)  # alice's own
    assert (filled.folder.loras / f"{sha256_of(OWN)}.safetensors").exists()


def test_what_cannot_be_wiped_for_sure_is_told_and_left(store: Store, filled: Filled) -> None:
    lock = StoreLock(filled.folder.jobs)
    lock.acquire()
    code, told = store("forget", "--caller", ALICE)
    lock.release()
    assert code == 1
    assert "in use by another process" in told["error"]
    whole = filled.folder.database.read_bytes()
    filled.folder.database.write_bytes(whole[: len(whole) // 2])
    code, told = store("forget", "--caller", ALICE)
    assert code == 1
    assert "store repair" in told["error"]
    assert (filled.folder.downloads / f"{sha256_of(FETCHED)}.safetensors").exists()


def test_without_room_rows_are_overwritten_where_they_lie(
    store: Store, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(filled.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    code, told = store("forget", "--caller", ALICE)
    assert code == 0
    assert any("no room" in line for line in told["done"])
    assert SECRET.encode() not in _bytes_below(filled.root)


def test_a_caller_is_named(filled: Filled) -> None:
    from chromarpc_server.__main__ import main

    with pytest.raises(SystemExit) as left:
        main(["store", "forget", "--data-dir", str(filled.root)])
    assert left.value.code == 2
    assert len(_images_of(filled, BOB)) == 2


def test_what_a_killed_server_left_in_the_write_ahead_log_goes_too(
    store: Store, filled: Filled, tmp_path: Path
) -> None:
    files = [filled.folder.jobs / f"jobs.sqlite3{suffix}" for suffix in ("", "-wal")]
    with closing(sqlite3.connect(filled.folder.database, isolation_level=None)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        copy_job(writer, filled.waiting[ALICE], id="in-the-log")
        for path in files:
            shutil.copy(path, tmp_path / path.name)
    for path in files:
        shutil.copy(tmp_path / path.name, path)
    assert SECRET.encode() in files[1].read_bytes()
    code, told = store("forget", "--caller", ALICE)
    assert (code, told["counts"]["removed: jobs"]) == (0, 4)
    left = _bytes_below(filled.root)
    assert SECRET.encode() not in left
    assert ALICE.encode() not in left
