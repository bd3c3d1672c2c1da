"""Files below the root are hashed for whoever asks for an unknown hash: how much, for how long, and for whom."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import chromarpc
from chromarpc_server.adapters import root_hashes
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.errors import LoraNotFound
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.jobs.recovery import recover_adapters
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.pipeline.adapters.reader import MAX_FILE_BYTES
from tests.adapters.libraries import adapter_bytes, open_library
from tests.conftest import RunningServer

UNKNOWN = "sha256:" + "cd" * 32
NAME = "diffusion_model.img_in.lora_A.weight"


def hash_path(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sparse_adapter(path: Path, data_bytes: int) -> None:
    """A file whose header is an adapter's and tells the truth, and which takes no room on the disk."""
    tensor = {"dtype": "F32", "shape": [data_bytes // 4], "data_offsets": [0, data_bytes]}
    header = json.dumps({NAME: tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + data_bytes)


@pytest.fixture
def library(root: Path, tmp_path: Path) -> AdapterLibrary:
    return open_library(root, tmp_path / "data")


@pytest.fixture
def sources(library: AdapterLibrary) -> AdapterSources:
    return AdapterSources(library, None)


class Reads:
    """Counts the pieces that are read of files."""

    def __init__(self) -> None:
        self.count = 0
        self._awaited = (0, threading.Event())

    async def more(self) -> None:
        """Returns once some more pieces were read."""
        reached = threading.Event()
        self._awaited = (self.count + 20, reached)
        assert await asyncio.to_thread(reached.wait, 30)

    def open(self, descriptor: int, mode: str) -> io.BufferedReader:
        reads = self

        class Counted(io.BufferedReader):
            def read(self, size: int | None = -1, /) -> bytes:
                reads.count += 1
                at, reached = reads._awaited
                if reads.count >= at:
                    reached.set()
                return super().read(size)

        return Counted(io.FileIO(descriptor, "r"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Files are hashed in pieces of a page, one a slice."""
    reads = Reads()
    monkeypatch.setattr(os, "fdopen", reads.open)
    monkeypatch.setattr(root_hashes, "_READ_BYTES", 4096)
    monkeypatch.setattr(root_hashes, "SLICE_S", 0.0, raising=False)
    return reads


async def find(sources: AdapterSources, path: str) -> AdapterFile | None:
    (file,) = (await sources.find([PlannedLora(path, 1.0)])).files
    return file


async def refusal(sources: AdapterSources, path: str) -> LoraNotFound:
    with pytest.raises(LoraNotFound) as caught:
        await find(sources, path)
    assert caught.value.violations[0].field == "loras.0.path"
    return caught.value


def wait_for_hashing() -> None:
    """Until the threads that hash for nobody, if there are any, are done."""
    for thread in threading.enumerate():
        if thread.name == "root-hashes":
            thread.join()


async def test_what_cannot_be_an_adapter_is_not_hashed(
    sources: AdapterSources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_hashes, "WAIT_S", 10.0)
    (root / "zeros.safetensors").touch()
    os.truncate(root / "zeros.safetensors", 2 * 1024**4)
    sparse_adapter(root / "honest.safetensors", 2 * 1024**4)
    sparse_adapter(root / "larger.safetensors", MAX_FILE_BYTES)
    sparse_adapter(root / "longer.safetensors", 1024)
    os.truncate(root / "longer.safetensors", 2 * 1024**4)
    (root / "page.safetensors").write_bytes(b"<html>")
    (root / "z.safetensors").write_bytes(adapter_bytes())
    error = await refusal(sources, UNKNOWN)
    assert (error.message, error.retry_after_s) == ("the server has no adapter with this hash", None)
    found = await find(sources, hash_path(adapter_bytes()))
    assert found is not None
    assert found.path == root / "z.safetensors"


async def test_nothing_is_hashed_for_a_caller_that_went_away(
    sources: AdapterSources, root: Path, reads: Reads
) -> None:
    sparse_adapter(root / "a.safetensors", 2 * 1024**3)
    asking = asyncio.create_task(find(sources, UNKNOWN))
    await reads.more()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.get_running_loop().shutdown_default_executor()
    wait_for_hashing()
    assert reads.count < 2 * 1024**3 / 4096 / 2


async def test_nothing_is_hashed_for_a_call_that_was_cancelled_or_a_server_that_stops(
    serve: Callable[..., RunningServer], root: Path, reads: Reads
) -> None:
    sparse_adapter(root / "a.safetensors", 2 * 1024**3)
    server = serve(lora_root=root)
    async with chromarpc.AsyncClient(server.target, timeout_s=60) as client:

        async def generate() -> list[Any]:
            request = {"model": "chroma-mini", "width": 64, "height": 64, "loras": [chromarpc.Lora(UNKNOWN)]}
            return [event async for event in client.generate("a", **request)]

        cancelled = asyncio.create_task(generate())
        await reads.more()
        cancelled.cancel()
        with suppress(asyncio.CancelledError):
            await cancelled
        waiting = asyncio.create_task(generate())
        inspecting = asyncio.create_task(client.inspect_lora(UNKNOWN, model="chroma-mini"))
        await reads.more()
        assert await asyncio.to_thread(server.stop) == 0
        outcomes = await asyncio.gather(waiting, inspecting, return_exceptions=True)
    assert all(isinstance(outcome, chromarpc.StatusError) for outcome in outcomes), outcomes
    wait_for_hashing()
    assert reads.count < 2 * 1024**3 / 4096 / 2


async def test_hashing_goes_on_where_the_last_caller_left_it(
    library: AdapterLibrary, root: Path, reads: Reads
) -> None:
    data = adapter_bytes()
    pieces = 50
    sparse_adapter(root / "a.safetensors", pieces * 4096)
    wanted = hash_path((root / "a.safetensors").read_bytes())
    asked = 0
    for _ in range(10 * pieces):
        asked += 1
        try:
            found = await library.look_up(wanted, "path", wait_s=1e-9)
        except LoraNotFound as error:
            assert "has not hashed all files" in error.message
            assert error.retry_after_s
            assert error.violations[0].field == "path"
        else:
            break
    assert found.path == root / "a.safetensors"
    assert pieces <= asked <= pieces + 10
    (root / "b.safetensors").write_bytes(data)
    os.utime(root / "a.safetensors", ns=(0, 0))
    assert (await library.look_up(hash_path(data), "path")).path == root / "b.safetensors"
    assert (await library.look_up(wanted, "path")).path == root / "a.safetensors"


async def test_many_callers_share_one_slice_and_each_is_answered_once_it_can_be(
    library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    for seed in range(5):
        (root / f"{seed}.safetensors").write_bytes(adapter_bytes(seed))
    sparse_adapter(root / "z.safetensors", 2 * 1024**3)
    at_once, most, plain = 0, 0, root_hashes.RootHashes._hash

    def counted(hashes: Any, *args: Any) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        plain(hashes, *args)
        at_once -= 1

    monkeypatch.setattr(root_hashes.RootHashes, "_hash", counted)
    strangers = [asyncio.create_task(library.look_up(UNKNOWN, "path")) for _ in range(20)]
    found = await asyncio.gather(*(library.look_up(hash_path(adapter_bytes(seed)), "path") for seed in range(5)))
    assert [file.path.name for file in found] == [f"{seed}.safetensors" for seed in range(5)]
    assert not any(stranger.done() for stranger in strangers)
    # They wait on the event loop: threads are free for everybody else.
    assert await asyncio.wait_for(library.look_up("0.safetensors", "path"), 5)
    library.stop_hashing()
    for answer in await asyncio.gather(*strangers, return_exceptions=True):
        assert isinstance(answer, LoraNotFound)
    assert most == 1


async def test_a_file_that_changes_while_it_is_hashed_has_no_hash_but_its_new_one(
    library: AdapterLibrary, root: Path, reads: Reads
) -> None:
    file = root / "a.safetensors"
    sparse_adapter(file, 50 * 4096)
    old = hash_path(file.read_bytes())
    with pytest.raises(LoraNotFound):
        await library.look_up(old, "path", wait_s=1e-9)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(file, ns=(0, 0))
    new = hash_path(file.read_bytes())
    with pytest.raises(LoraNotFound, match=r"no adapter with this hash$"):
        await library.look_up(old, "path")
    assert (await library.look_up(new, "path")).path == file


async def test_a_file_that_cannot_be_read_now_is_tried_again_for_the_next_caller(
    library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = adapter_bytes()
    (root / "a.safetensors").write_bytes(data)

    def fail(_file: AdapterFile) -> io.BufferedReader:
        raise PermissionError

    with monkeypatch.context() as unreadable:
        unreadable.setattr(AdapterFile, "open", fail)
        with pytest.raises(LoraNotFound, match=r"with this hash$"):
            await library.look_up(hash_path(data), "path")
    assert (await library.look_up(hash_path(data), "path")).path == root / "a.safetensors"


def stored(path: str, known: KnownAdapter | None) -> Any:
    """As much of an unfinished job as finding its adapters needs."""
    plan = SimpleNamespace(loras=(PlannedLora(path, 1.0),))
    return SimpleNamespace(plan=plan, adapters=(known,), owner="", needs_token=False)


async def test_after_a_restart_a_hash_names_what_it_named_before_without_hashing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = adapter_bytes()
    (root / "a.safetensors").write_bytes(data)
    before = await find(AdapterSources(open_library(root, tmp_path / "data"), None), hash_path(data))
    assert before is not None
    monkeypatch.setattr(root_hashes, "require_adapter_file", lambda *_: pytest.fail("it was read"), raising=False)
    monkeypatch.setattr(root_hashes, "_sha256", lambda _: pytest.fail("it was read"), raising=False)
    again = AdapterSources(open_library(root, tmp_path / "data"), None)
    found = await recover_adapters(stored(hash_path(data), KnownAdapter.of(before)), again)
    assert found.files == (before,)


async def test_after_a_restart_nothing_is_hashed_for_what_was_fetched(
    root: Path, tmp_path: Path, reads: Reads
) -> None:
    (root / "a.safetensors").write_bytes(adapter_bytes())
    sources = AdapterSources(open_library(root, tmp_path / "data"), None)
    known = KnownAdapter(1, 2, 3, "cd" * 32)
    found = await recover_adapters(stored("https://adapters.example/a", known), sources)
    assert found.files == (None,)
    assert reads.count == 0
