"""What processes have not finished: kept while they live, whatever clocks say, and removed by a later start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.process_folder import ProcessFolder
from tests.adapters.libraries import adapter_bytes, open_library, parts, sha256_of

HOLD = """
import sys
from pathlib import Path
from chromarpc_server.adapters.process_folder import ProcessFolder
own = ProcessFolder(Path(sys.argv[1]))
folder = own.path()
(folder / "a.part").write_bytes(b"x")
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_start_leaves_a_living_process_its_files_and_removes_those_of_a_dead_one(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        for age_s in (0, -(10**9), 10**9):  # of neither of which anything follows
            os.utime(folder / "a.part", (1e9 + age_s, 1e9 + age_s))
            ProcessFolder(tmp_path).remove_abandoned()
            assert (folder / "a.part").exists()
        process.kill()
    ProcessFolder(tmp_path).remove_abandoned()
    assert list(tmp_path.iterdir()) == []


def test_a_start_leaves_another_server_its_unfinished_upload(
    library: AdapterLibrary, root: Path, tmp_path: Path
) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data))
    open_library(root, tmp_path / "data").remove_abandoned()
    library.uploads.append(state.upload_id, 0, data)
    assert library.uploads.finalize(state.upload_id, sha256_of(data)).sha256 == sha256_of(data)


def test_what_a_server_has_not_finished_goes_when_it_stops(library: AdapterLibrary, tmp_path: Path) -> None:
    library.uploads.create("a", 100)
    assert parts(tmp_path)
    library.close()
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


def test_a_start_removes_what_was_begun_before_it_was_locked_and_by_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "0123.part").write_bytes(b"x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_bytes(b"x")
    ProcessFolder(tmp_path).remove_abandoned()
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_a_folder_that_a_start_takes_for_abandoned_while_it_is_made_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_mkdir, made = Path.mkdir, []

    def mkdir_then_start(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        plain_mkdir(path, mode, parents, exist_ok)
        made.append(path)
        if len(made) == 1:
            ProcessFolder(tmp_path).remove_abandoned()

    monkeypatch.setattr(Path, "mkdir", mkdir_then_start)
    folder = ProcessFolder(tmp_path).path()
    assert len(made) == 2
    assert folder == made[1]
    assert folder.is_dir()
