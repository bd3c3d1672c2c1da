"""Content is what its name says: damaged adapters are refused by name, and the same bytes sent again heal them."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from chromarpc_server.adapters import reading
from chromarpc_server.adapters.damage import damaged_adapters
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.errors import LoraDamaged, LoraInvalid, UploadsFull
from chromarpc_server.domain.limits import UploadLimits
from chromarpc_server.jobs.recovery import recover_adapters
from chromarpc_server.jobs.store.records import KnownAdapter
from chromarpc_server.runtime.adapter_cache import AdapterCache
from tests.adapters.libraries import adapter_bytes, flip_a_bit, open_library, sha256_of, upload
from tests.adapters.test_root_hashes import stored
from tests.tiny_checkpoint import GOLDENS

TARGETS = {
    name: tuple(tensor.shape)
    for name, tensor in load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors").items()
}
DATA = (GOLDENS / "adapters" / "aitk.safetensors").read_bytes()
SHA256 = sha256_of(DATA)
PATH = f"sha256:{SHA256}"


@pytest.fixture
def library(tmp_path: Path) -> AdapterLibrary:
    library = open_library(None, tmp_path / "data")
    upload(library, DATA, chunk=len(DATA))
    return library


def read(library: AdapterLibrary, cache: AdapterCache | None = None) -> Any:
    file = library.locate(PATH, "path")
    return (cache or AdapterCache(10**9)).read(file, "1", TARGETS, check=lambda: None)


def stored_file(library: AdapterLibrary) -> Path:
    return library.locate(PATH, "path").path


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, lambda file: flip_a_bit(file, 20), lambda file: flip_a_bit(file, 7), cut_short, empty],
    ids=["values", "header", "header's length", "cut short", "empty"],
)
def test_damaged_bytes_are_refused_by_name_and_logged_and_counted_once(
    damage: Callable[[Path], None], library: AdapterLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    before = damaged_adapters()
    damage(stored_file(library))
    for _ in range(2):
        with pytest.raises(LoraDamaged, match=SHA256) as caught:
            read(library)
        assert caught.value.metadata == {"sha256": SHA256}
    assert damaged_adapters() == before + 1
    (line,) = (record for record in caplog.records if record.message == "adapter.damaged")
    assert (line.levelno, line.__dict__["sha256"]) == (logging.ERROR, SHA256)


def test_a_good_file_is_read_once(library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterFile, "require_content", lambda *_: pytest.fail("it was read twice"))
    assert read(library).sha256 == SHA256


def test_a_file_that_the_disk_cannot_read_is_damaged(
    library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    plain_open = AdapterFile.open
    monkeypatch.setattr(AdapterFile, "open", lambda file: Failing(plain_open(file).detach()))
    monkeypatch.setattr(reading, "_reopened", lambda stream: Failing(io.FileIO(os.dup(stream.fileno()))))
    with pytest.raises(LoraDamaged):
        read(library)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, LoraDamaged), (errno.EMFILE, LoraInvalid)])
def test_a_file_that_cannot_be_opened_is_damaged_only_where_the_disk_says_so(
    number: int, kind: type[Exception], library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: AdapterFile) -> BufferedReader:
        raise OSError(number, "it cannot be opened")

    monkeypatch.setattr(AdapterFile, "open", fail)
    with pytest.raises(kind):
        read(library)


def test_a_bad_file_that_has_its_hash_is_bad_and_not_damaged(tmp_path: Path) -> None:
    library = open_library(None, tmp_path / "data")
    data = b"no adapter"
    file = tmp_path / "data" / "downloads" / f"{sha256_of(data)}.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    with pytest.raises(LoraInvalid):
        AdapterCache(1).read(library.locate(f"sha256:{file.stem}", "path"), "1", TARGETS, check=lambda: None)


def test_what_was_read_while_the_file_was_good_is_still_drawn_with(library: AdapterLibrary) -> None:
    cache = AdapterCache(10**9)
    good = read(library, cache)
    flip_a_bit(stored_file(library))
    assert read(library, cache) is good


def test_the_same_bytes_sent_again_heal_what_a_waiting_job_names(library: AdapterLibrary) -> None:
    waiting = library.locate(PATH, "path")
    before, inode = damaged_adapters(), waiting.path.stat().st_ino
    flip_a_bit(waiting.path)
    assert library.whole_upload(SHA256) is None
    upload(library, DATA, chunk=len(DATA))
    assert waiting.path.stat().st_ino != inode
    assert library.whole_upload(SHA256) is not None
    assert AdapterCache(10**9).read(waiting, "1", TARGETS, check=lambda: None).sha256 == SHA256
    assert library.locate(PATH, "path") == waiting
    flip_a_bit(waiting.path)
    assert library.whole_upload(SHA256) is None
    assert damaged_adapters() == before + 2


def test_a_file_that_is_healed_while_it_is_read_is_read_as_it_was(library: AdapterLibrary, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(DATA)
    file = library.locate(PATH, "path")
    flip_a_bit(file.path, 20)
    healed: list[bool] = []

    def heal() -> None:
        if not healed:
            healed.append(True)
            shutil.copyfile(good, tmp_path / "part")
            (tmp_path / "part").replace(file.path)

    with pytest.raises(LoraDamaged):
        AdapterCache(10**9).read(file, "1", TARGETS, check=heal)
    assert AdapterCache(10**9).read(file, "1", TARGETS, check=heal).sha256 == SHA256


def test_healing_takes_no_more_of_a_quota_than_the_file_has_already(
    library: AdapterLibrary, tmp_path: Path
) -> None:
    library = open_library(None, tmp_path / "data", UploadLimits(max_total_bytes=len(DATA) + 100))
    with pytest.raises(UploadsFull):
        library.uploads.create("a", len(DATA), sha256_of(adapter_bytes()))
    library.uploads.create("a", len(DATA), SHA256)


def test_the_same_bytes_from_somebody_else_heal_it_and_leave_it_to_its_owner_as_old_as_it_was(
    tmp_path: Path,
) -> None:
    library = open_library(None, tmp_path / "data")
    (lora,) = (upload(library, DATA, chunk=len(DATA)),)
    flip_a_bit(stored_file(library))
    with (tmp_path / "other").open("wb") as part:
        part.write(DATA)
    library.uploads.store.add(tmp_path / "other", SHA256, "bob", "theirs")
    assert library.listing().loras == (lora,)
    assert stored_file(library).read_bytes() == DATA


async def test_jobs_that_earlier_versions_stored_find_a_healed_upload(
    library: AdapterLibrary, tmp_path: Path
) -> None:
    sources, file = AdapterSources(library, None), library.locate(PATH, "path")
    os.link(file.path, tmp_path / "kept")  # so that no other file gets its inode
    known = KnownAdapter(file.size_bytes, file.modified_ns, file.inode)  # as they wrote it: no hash
    for again in (known, KnownAdapter.of(file)):
        upload(library, DATA, chunk=len(DATA))
        assert library.locate(PATH, "path").inode != file.inode
        assert (await recover_adapters(stored(PATH, again), sources)).files == (file,)
