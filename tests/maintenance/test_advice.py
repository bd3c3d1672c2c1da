"""What the store's error texts advise is run as written, and then the server starts."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.__main__ import main
from chromarpc_server.app import App
from chromarpc_server.domain.error_table import ENTRIES
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.jobs.store.unusable import StoreUnusable
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer
from tests.maintenance.conftest import Filled

Store = Callable[..., tuple[int, dict[str, Any]]]
Serve = Callable[..., RunningServer]


def _refusal(filled: Filled, checkpoint: Path) -> str:
    """What a server says that does not start."""
    app = App(ServerSettings(port=0, device="cpu", model_folder={"chroma-mini": checkpoint}, **filled.settings))
    with pytest.raises(StoreUnusable) as told:
        asyncio.run(app.run())
    return str(told.value)


def _commands(text: str) -> list[str]:
    return re.findall(r"`(chromarpc-server [^`]+)`", text)


def _run(command: str) -> object:
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command)[1:])
    return left.value.code


def _cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def _overwrite(database: Path) -> None:
    with database.open("r+b") as file:
        file.write(os.urandom(4096))


@pytest.mark.parametrize("damage", [_cut, _overwrite])
@pytest.mark.parametrize("advice", range(2))
def test_both_ways_out_of_a_damaged_database(
    store: Store, filled: Filled, serve: Serve, tiny_checkpoint: Path, tmp_path: Path, damage: Any, advice: int
) -> None:
    assert store("backup", tmp_path / "saved")[0] == 0
    damage(filled.folder.database)
    told = _refusal(filled, tiny_checkpoint)
    assert "is damaged" in told
    commands = _commands(told)
    assert len(commands) == 2
    assert _run(commands[advice].replace("BACKUP", str(tmp_path / "saved"))) == 0
    serve(**filled.settings)


def _newer(filled: Filled) -> None:
    with closing(sqlite3.connect(filled.folder.database)) as database:
        database.execute("PRAGMA user_version = 99")


def _unwritable(filled: Filled) -> None:
    filled.folder.jobs.rename(filled.root / "moved")
    filled.folder.jobs.write_bytes(b"no folder")


@pytest.mark.parametrize("cause", [_newer, _unwritable, StoreLock])
def test_another_folder_or_no_store_on_disk_is_a_way_out(
    filled: Filled, serve: Serve, tiny_checkpoint: Path, tmp_path: Path, cause: Callable[..., Any]
) -> None:
    held = cause(filled.folder.jobs if cause is StoreLock else filled)
    if held is not None:
        held.acquire()
    told = _refusal(filled, tiny_checkpoint)
    assert _commands(told) == []
    assert "--data-dir" in told
    settings = {**filled.settings, "data_dir": tmp_path / "another"}
    if "--store" in told:
        settings = {**filled.settings, "store": "memory"}
    serve(**settings).stop()
    if held is not None:
        assert "stop that one" in told
        held.release()
        serve(**filled.settings)


def test_every_command_that_the_table_of_errors_names_runs(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHROMARPC_DATA_DIR", str(filled.root))
    named = {command for entry in ENTRIES for command in _commands(entry.operator) if " store " in command}
    assert named == {"chromarpc-server store check", "chromarpc-server store repair"}
    for command in sorted(named):
        assert _run(command) == 0
        assert "all is well" in capsys.readouterr().out


def test_a_folder_with_a_space_is_quoted(store: Store, filled: Filled, tiny_checkpoint: Path) -> None:
    root = filled.root.with_name("my data")
    filled.root.rename(root)
    filled.root = root
    _cut(filled.folder.database)
    for text in (_refusal(filled, tiny_checkpoint), store("check")[1]["problems"][0]["advice"]):
        assert _run(_commands(text)[0]) == 0


def test_what_check_advises_is_run_as_written(
    store: Store, filled: Filled, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = next(filled.folder.image_files())
    filled.folder.lost_and_found.mkdir(exist_ok=True)
    lost.rename(filled.folder.lost_and_found / lost.name)
    (problem,) = store("check")[1]["problems"]
    (command,) = _commands(problem["advice"])
    assert _run(command) == 0
    assert "put jobs/images/" in capsys.readouterr().out
    assert store("check")[0] == 0
    serve(**filled.settings)
