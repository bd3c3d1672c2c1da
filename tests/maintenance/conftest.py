"""A data folder that a real server has filled: two callers, shared and own content, jobs that wait."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc_server.__main__ import main
from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.jobs.store.rows import plan_check
from chromarpc_server.maintenance.layout import DataFolder
from tests.conftest import start_server
from tests.faults.processes import until_step
from tests.tiny_checkpoint import GOLDENS

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2, "seed": 1}
LONG: dict[str, Any] = {**SMALL, "width": 256, "height": 256, "sample_steps": 100}
TOKENS = {"alice-of-the-studio": "token-of-alice", "bob": "token-of-bob"}
ALICE, BOB = TOKENS
SECRET = "a heron that only alice knows"
OWN, SHARED, FETCHED = (GOLDENS / "adapters" / f"{name}.safetensors" for name in ("aitk", "kohya", "loha"))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Filled:
    """What lies where."""

    root: Path
    callers: Path
    ended: dict[str, list[str]] = field(default_factory=dict)
    """Ids of each caller's jobs that ended; each has one image."""
    waiting: dict[str, str] = field(default_factory=dict)
    """The job of each caller that did not end; bob's is drawn with his upload."""

    @property
    def folder(self) -> DataFolder:
        return DataFolder(self.root)

    @property
    def settings(self) -> dict[str, Any]:
        return {"data_dir": self.root, "callers": self.callers, "grace_s": 0}


def write_callers(path: Path) -> Path:
    entries = (
        f'[[callers]]\nname = "{name}"\ntoken_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
        for name, token in TOKENS.items()
    )
    path.write_text("\n".join(entries))
    return path


@pytest.fixture(scope="session")
def _filled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    top = tmp_path_factory.mktemp("filled")
    made = Filled(top / "data", write_callers(top / "callers.toml"))
    server = start_server(**made.settings, model_folder={"chroma-mini": tiny_checkpoint})
    clients = {name: chromarpc.Client(server.target, token=token) for name, token in TOKENS.items()}
    try:
        alice, bob = clients[ALICE], clients[BOB]
        alice.upload_lora(OWN)
        for client in (alice, bob):
            client.upload_lora(SHARED)
        for name, prompts in ((ALICE, (SECRET, "both draw this")), (BOB, ("both draw this", "a dog of bob"))):
            made.ended[name] = [clients[name].create_job(prompt, **SMALL).job_id for prompt in prompts]
            for job_id in made.ended[name]:
                list(clients[name].watch_job(job_id))
        made.waiting[ALICE] = alice.create_job(f"{SECRET}, twice", **LONG).job_id
        until_step(alice.watch_job(made.waiting[ALICE]))
        lora = chromarpc.Lora(f"sha256:{sha256_of(SHARED)}")
        made.waiting[BOB] = bob.create_job("waits", loras=[lora], **SMALL).job_id
        server.stop()
    finally:
        for client in clients.values():
            client.close()
        if server.thread.is_alive():
            server.stop()
    downloads = ContentStore(made.folder.downloads, LoraSource.DOWNLOAD)
    part = made.folder.downloads / "fetched"
    shutil.copy(FETCHED, part)
    downloads.add(part, sha256_of(FETCHED), ALICE, "")
    downloads.unfinished.close()
    return made


@pytest.fixture
def filled(_filled: Filled, tmp_path: Path) -> Filled:
    """A copy to do with as the test likes."""
    shutil.copytree(_filled.root, tmp_path / "data")
    return Filled(tmp_path / "data", _filled.callers, _filled.ended, _filled.waiting)


@pytest.fixture
def store(filled: Filled, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs `chromarpc-server store … --json` on it. Returns the exit code and what was printed."""

    def run(*arguments: object, data_dir: Path | None = None) -> tuple[int, dict[str, Any]]:
        command = ["store", *map(str, arguments), "--data-dir", str(data_dir or filled.root), "--json"]
        with pytest.raises(SystemExit) as left:
            main(command)
        printed = capsys.readouterr().out
        assert SECRET not in printed
        assert isinstance(left.value.code, int)
        return left.value.code, json.loads(printed)

    return run


def copy_job(database: sqlite3.Connection, job_id: str, **changes: Any) -> None:
    """Makes another row of a job that did not end, as a server would have written it."""
    database.row_factory = sqlite3.Row
    row = dict(database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())
    del row["number"]
    row |= {"request_id": None, **changes}
    row["plan_check"] = plan_check(row)
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))  # noqa: S608


def flip_bit(path: Path, where: float = 0.5) -> None:
    """Damages a file as a disk does: another byte, and neither its size nor its times change."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
