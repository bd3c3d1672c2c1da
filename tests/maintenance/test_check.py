"""`chromarpc-server store check` sees every kind of damage, says what to do, and changes nothing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.__main__ import main
from tests.maintenance.conftest import ALICE, BOB, FETCHED, OWN, SHARED, Filled, flip_bit, sha256_of

Store = Callable[..., tuple[int, dict[str, Any]]]


def _image(filled: Filled, job_id: str) -> Path:
    with sqlite3.connect(filled.folder.database) as database:
        (sha256,) = database.execute("SELECT sha256 FROM images WHERE job = ?", (job_id,)).fetchone()
    database.close()
    return filled.folder.image(sha256)


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if "-shm" not in path.name}


def test_a_whole_store_is_counted_and_left_alone(store: Store, filled: Filled) -> None:
    before = _contents(filled.root)
    code, told = store("check")
    assert (code, told["problems"], told["ok"]) == (0, [], True)
    assert told["counts"]["jobs that ended"] == 4
    assert told["counts"]["jobs that wait or run"] == 2
    assert told["counts"]["images"] == len(list(filled.folder.image_files()))
    assert (told["counts"]["uploads"], told["counts"]["downloads"]) == (2, 1)
    after = _contents(filled.root)
    assert {path: after[path] for path in before} == before
    assert all(path.endswith("-wal") and not after[path][1] for path in after.keys() - before.keys())


def test_flipped_bits_are_found_everywhere(store: Store, filled: Filled) -> None:
    folder = filled.folder
    job_id = filled.ended[ALICE][0]
    image = _image(filled, job_id)
    upload, download = (
        folder.loras / f"{sha256_of(OWN)}.safetensors",
        folder.downloads / f"{sha256_of(FETCHED)}.safetensors",
    )
    for path in (image, upload, download):
        flip_bit(path)
    note = folder.loras / f"{sha256_of(SHARED)}.json"
    flip_bit(note, 0)
    code, told = store("check")
    assert code == 1
    found = {problem["subject"]: problem for problem in told["problems"]}
    assert found.keys() == {folder.name_of(path) for path in (image, upload, download, note)}
    assert "RedrawJob" in found[folder.name_of(image)]["advice"]
    assert job_id in found[folder.name_of(image)]["advice"]
    assert "upload the same file again" in found[folder.name_of(upload)]["advice"]
    assert f"store repair --data-dir {filled.root}`" in found[folder.name_of(note)]["advice"]


def test_what_is_gone_is_named_and_one_in_lost_and_found_can_be_put_back(store: Store, filled: Filled) -> None:
    gone, moved = _image(filled, filled.ended[ALICE][0]), _image(filled, filled.ended[BOB][1])
    gone.unlink()
    filled.folder.lost_and_found.mkdir(exist_ok=True)
    moved.rename(filled.folder.lost_and_found / moved.name)
    (filled.folder.loras / f"{sha256_of(OWN)}.json").unlink()
    code, told = store("check")
    found = {problem["subject"]: problem["advice"] for problem in told["problems"]}
    assert code == 1
    assert "RedrawJob" in found[filled.folder.name_of(gone)]
    assert "lies in lost+found" in found[filled.folder.name_of(moved)]
    assert f"loras/{sha256_of(OWN)}.json" in found
    (listed,) = told["listed"]["jobs/images/lost+found"]
    assert (listed["name"], listed["size_bytes"] > 0) == (moved.name, True)


def test_a_row_that_cannot_be_read_is_that_job_s_trouble(store: Store, filled: Filled) -> None:
    job_id = filled.ended[BOB][1]
    with sqlite3.connect(filled.folder.database) as database:
        database.execute("UPDATE jobs SET plan = replace(plan, '{', '[') WHERE id = ?", (job_id,))
    database.close()
    code, told = store("check")
    assert code == 1
    (problem,) = told["problems"]
    assert problem["subject"] == f"job {job_id}"
    assert told["counts"]["jobs that ended"] == 3


def test_a_damaged_database_is_told_and_everything_else_is_checked_all_the_same(
    store: Store, filled: Filled
) -> None:
    flip_bit(filled.folder.loras / f"{sha256_of(OWN)}.safetensors")
    whole = filled.folder.database.read_bytes()
    filled.folder.database.write_bytes(b"\0" * 100 + whole[100:])
    code, told = store("check")
    assert code == 1
    subjects = [problem["subject"] for problem in told["problems"]]
    assert subjects == ["jobs/jobs.sqlite3", f"loras/{sha256_of(OWN)}.safetensors"]
    assert "store repair" in told["problems"][0]["advice"]


def test_people_get_sentences_and_the_exit_code(filled: Filled, capsys: pytest.CaptureFixture[str]) -> None:
    (filled.folder.loras / f"{sha256_of(OWN)}.safetensors").write_bytes(b"cut short")
    with pytest.raises(SystemExit) as left:
        main(["store", "check", "--data-dir", str(filled.root)])
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "jobs that ended: 4" in lines
    assert lines[-1] == "check: problems found: 1"
    assert lines[-2].startswith(
        f"problem: loras/{sha256_of(OWN)}.safetensors: its bytes have another SHA-256; upload"
    )


def test_the_folder_comes_from_the_flag_the_environment_or_the_server_s_file(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def code(*arguments: str) -> object:
        with pytest.raises(SystemExit) as left:
            main(["store", "check", *arguments])
        return left.value.code

    config = tmp_path / "server.toml"
    config.write_text(f'data_dir = "{filled.root}"\nport = 0\nlora_root = "/nowhere"\n')
    assert code("--config", str(config)) == 0
    monkeypatch.setenv("CHROMARPC_DATA_DIR", str(tmp_path / "none"))
    assert code("--config", str(config)) == 1
    assert f"{tmp_path / 'none'} holds no store" in capsys.readouterr().err
    assert code("--data-dir", str(filled.root)) == 0
    assert code("--config", str(tmp_path / "none.toml")) == 2
    assert code("--no-such-flag") == 2
    with pytest.raises(SystemExit) as left:
        main(["store"])
    assert left.value.code == 2


def test_the_command_imports_neither_torch_nor_grpc(tmp_path: Path) -> None:
    program = (
        "import sys; from chromarpc_server.__main__ import main\n"
        "try: main(['store', 'check', '--data-dir', sys.argv[1]])\n"
        "except SystemExit: print(sorted({'torch', 'grpc', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert told.stdout == "[]\n"
