"""A host's folder of adapters: what it writes, what it deletes, and how long it waits."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from filelock import FileLock

from chromarpc_server.cluster.host_files import ABANDONED_S, HostFiles, Pieces
from chromarpc_server.cluster.messages import HashedFile
from chromarpc_server.domain.errors import InvalidParameter, JobCancelled

DATA = b"an adapter"
WANTED = HashedFile(hashlib.sha256(DATA).hexdigest(), len(DATA))


async def _fetch() -> Pieces:
    async def pieces() -> tuple[bytes, bool]:
        return DATA, True

    return pieces


async def test_what_others_have_in_the_folder_stays(tmp_path: Path) -> None:
    old, theirs = "0" * 64, [tmp_path / "style.safetensors", tmp_path / "notes.txt"]
    ours = [tmp_path / f"{old}.safetensors", tmp_path / f"{old}.lock", tmp_path / "0123456789abcdef.part"]
    for file in (*theirs, *ours):
        file.write_bytes(b"x")
        os.utime(file, (0, ABANDONED_S))
    await HostFiles(tmp_path, 1).have(WANTED, _fetch)
    assert all(file.exists() for file in theirs)
    assert not any(file.exists() for file in ours)


def test_nothing_outside_the_folder_is_touched(tmp_path: Path) -> None:
    files = HostFiles(tmp_path / "folder", 1)
    with pytest.raises(InvalidParameter):
        asyncio.run(files.have(HashedFile("../outside", len(DATA)), _fetch))
    assert not list(tmp_path.rglob("outside*"))


async def test_a_job_that_is_stopped_waits_for_no_other_actors_fetch(tmp_path: Path) -> None:
    def check() -> None:
        raise JobCancelled("by the caller")

    with FileLock(tmp_path / f"{WANTED.sha256}.lock"), pytest.raises(JobCancelled):
        await HostFiles(tmp_path, 1).have(WANTED, _fetch, check)
