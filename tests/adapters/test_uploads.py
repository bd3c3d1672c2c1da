"""What an upload may do, what becomes of it, and what is kept of it."""

from __future__ import annotations

import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.names import display_name
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.errors import (
    DiskFull,
    InvalidParameter,
    LoraInvalid,
    LoraNotFound,
    UploadNotFound,
    UploadOutOfOrder,
    UploadsFull,
)
from chromarpc_server.domain.limits import UploadLimits
from tests.adapters.libraries import LIMITS, Clock, adapter_bytes, open_library, parts, sha256_of, upload


def test_an_upload_is_kept_under_its_hash(library: AdapterLibrary, tmp_path: Path) -> None:
    data = adapter_bytes()
    lora = upload(library, data)
    assert (lora.path, lora.source) == (f"sha256:{sha256_of(data)}", LoraSource.UPLOAD)
    assert (lora.filename, lora.size_bytes, lora.sha256) == ("a.safetensors", len(data), sha256_of(data))
    assert library.locate(lora.path, "path").path.read_bytes() == data
    assert library.listing().loras == (lora,)
    assert parts(tmp_path) == []


def test_nothing_is_written_before_the_first_upload(library: AdapterLibrary, tmp_path: Path) -> None:
    library.uploads.drop_expired()
    assert library.listing().loras == ()
    assert not (tmp_path / "data").exists()


def test_the_same_bytes_twice_are_one_adapter_under_the_later_name(library: AdapterLibrary) -> None:
    upload(library, adapter_bytes())
    upload(library, adapter_bytes(), "b.safetensors")
    (lora,) = library.listing().loras
    assert lora.filename == "b.safetensors"


def test_the_same_bytes_again_leave_the_file_that_jobs_wait_with(library: AdapterLibrary) -> None:
    path = upload(library, adapter_bytes()).path
    before = library.locate(path, "path")
    upload(library, adapter_bytes())
    after = library.locate(path, "path")
    assert after == before


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 200,
        pickle.dumps({"a": [1, 2, 3]}),
        adapter_bytes()[:-1],
        adapter_bytes()[:40],
        b"x",
        save({"model.layers.0.weight": torch.zeros(2, 2)}),
        save({}),
    ],
    ids=["zeros", "pickle", "truncated", "header cut", "one byte", "another model", "no tensors"],
)
def test_what_is_no_adapter_is_refused_and_dropped(library: AdapterLibrary, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid):
        upload(library, data)
    assert library.listing().loras == ()
    assert parts(tmp_path) == []


def test_a_zip_file_is_refused(library: AdapterLibrary) -> None:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", b"")
    with pytest.raises(LoraInvalid):
        upload(library, archive.getvalue())


def test_another_hash_is_refused_and_the_upload_dropped(library: AdapterLibrary, tmp_path: Path) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data))
    library.uploads.append(state.upload_id, 0, data)
    with pytest.raises(LoraInvalid, match="another hash") as caught:
        library.uploads.finalize(state.upload_id, "0" * 64)
    assert caught.value.violations[0].field == "sha256"
    with pytest.raises(UploadNotFound):
        library.uploads.append(state.upload_id, 0, data)
    assert parts(tmp_path) == []


def test_the_hash_that_was_announced_counts_as_well(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data), "0" * 64)
    library.uploads.append(state.upload_id, 0, data)
    with pytest.raises(LoraInvalid, match="another hash"):
        library.uploads.finalize(state.upload_id, sha256_of(data))


@pytest.mark.parametrize("size", [0, 4001, 2**63])
def test_a_size_out_of_bounds_is_refused_before_any_byte(library: AdapterLibrary, size: int) -> None:
    with pytest.raises(InvalidParameter, match="between 1 and 4000"):
        library.uploads.create("a", size)


def test_uploads_can_be_switched_off(root: Path, tmp_path: Path) -> None:
    closed = open_library(root, tmp_path / "data", UploadLimits(max_file_bytes=0))
    with pytest.raises(InvalidParameter, match="takes no uploads"):
        closed.uploads.create("a", 1)


@pytest.mark.parametrize("count", [0, 1001])
def test_a_chunk_out_of_bounds_is_refused(library: AdapterLibrary, count: int) -> None:
    state = library.uploads.create("a", 2000)
    with pytest.raises(InvalidParameter, match="1 to 1000 bytes"):
        library.uploads.append(state.upload_id, 0, b"x" * count)


def test_more_bytes_than_announced_are_refused(library: AdapterLibrary) -> None:
    state = library.uploads.create("a", 10)
    with pytest.raises(InvalidParameter, match="ends at byte 11"):
        library.uploads.append(state.upload_id, 0, b"x" * 11)


def test_a_chunk_may_come_again_and_only_the_same(library: AdapterLibrary) -> None:
    state = library.uploads.create("a", 100)
    library.uploads.append(state.upload_id, 0, b"abcdef")
    assert library.uploads.append(state.upload_id, 0, b"abcdef").next_offset == 6
    assert library.uploads.append(state.upload_id, 2, b"cd").next_offset == 6
    with pytest.raises(UploadOutOfOrder):
        library.uploads.append(state.upload_id, 0, b"abcdeX")


@pytest.mark.parametrize("offset", [3, 5, 7, 2**64 - 1])
def test_bytes_out_of_order_are_told_where_to_go_on(library: AdapterLibrary, offset: int) -> None:
    state = library.uploads.create("a", 2**12 - 96)
    library.uploads.append(state.upload_id, 0, b"abcdef")
    with pytest.raises((UploadOutOfOrder, InvalidParameter)) as caught:
        library.uploads.append(state.upload_id, offset, b"ghijkl")
    if offset < 4000:
        assert caught.value.metadata == {"expected_offset": "6"}
    assert library.uploads.append(state.upload_id, 6, b"ghijkl").next_offset == 12


def test_missing_bytes_leave_the_upload_as_it_is(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data))
    library.uploads.append(state.upload_id, 0, data[:50])
    with pytest.raises(UploadOutOfOrder, match="begins at byte 50"):
        library.uploads.finalize(state.upload_id, sha256_of(data))
    library.uploads.append(state.upload_id, 50, data[50:])
    assert library.uploads.finalize(state.upload_id, sha256_of(data)).size_bytes == len(data)


def test_the_end_may_be_asked_for_again(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data))
    library.uploads.append(state.upload_id, 0, data)
    first = library.uploads.finalize(state.upload_id, sha256_of(data))
    assert library.uploads.finalize(state.upload_id, sha256_of(data).upper()) == first
    with pytest.raises(UploadNotFound):
        library.uploads.finalize(state.upload_id, "0" * 64)
    library.delete(first.path)
    with pytest.raises(LoraNotFound, match="deleted after"):
        library.uploads.finalize(state.upload_id, sha256_of(data))


def test_an_abandoned_upload_expires_and_each_chunk_puts_that_off(
    library: AdapterLibrary, clock: Clock, tmp_path: Path
) -> None:
    state = library.uploads.create("a", 100)
    clock.now += 59
    assert library.uploads.append(state.upload_id, 0, b"x").expires.timestamp() == clock.now + 60
    clock.now += 59
    library.uploads.append(state.upload_id, 1, b"x")
    clock.now += 60
    with pytest.raises(UploadNotFound):
        library.uploads.append(state.upload_id, 2, b"x")
    library.uploads.drop_expired()
    assert parts(tmp_path) == []


@pytest.mark.parametrize("step_s", [25 * 3600, -49 * 3600], ids=["forward", "back"])
def test_an_upload_survives_a_step_of_the_wall_clock_and_expires_all_the_same(
    root: Path, tmp_path: Path, clock: Clock, step_s: float
) -> None:
    wall = Clock()
    library = open_library(root, tmp_path / "data", LIMITS, clock=clock, wall_clock=wall)
    state = library.uploads.create("a", 100)
    wall.now += step_s
    library.uploads.drop_expired()
    clock.now += 59
    assert library.uploads.append(state.upload_id, 0, b"x").expires.timestamp() == wall.now + 60
    clock.now += 60
    with pytest.raises(UploadNotFound):
        library.uploads.append(state.upload_id, 1, b"x")


def test_only_so_many_uploads_are_open_at_once(library: AdapterLibrary, clock: Clock) -> None:
    library.uploads.create("a", 10)
    library.uploads.create("b", 10)
    with pytest.raises(UploadsFull) as caught:
        library.uploads.create("c", 10)
    assert caught.value.retry_after_s
    clock.now += 60
    library.uploads.create("c", 10)


def test_uploads_share_a_bound_with_what_is_still_to_come(library: AdapterLibrary) -> None:
    lora = upload(library, adapter_bytes())
    library.uploads.create("a", 4000)
    room = 6000 - 4000 - lora.size_bytes
    with pytest.raises(UploadsFull, match="delete some"):
        library.uploads.create("b", room + 1)
    library.uploads.create("b", room)


def test_a_full_disk_is_told_and_the_upload_goes_on_later(
    library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = library.uploads.create("a", 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DiskFull, match="disk has no room for this upload: delete"):
            library.uploads.append(state.upload_id, 0, b"x")
    assert library.uploads.append(state.upload_id, 0, b"x").next_offset == 1


def test_an_upload_that_would_use_up_the_reserve_with_those_under_way_is_not_begun(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = DiskRoom(tmp_path, 1000)
    library = open_library(root, tmp_path / "data", LIMITS, room=room)
    monkeypatch.setattr(room, "free_bytes", lambda: 3000)
    state = library.uploads.create("a", 1500)
    with pytest.raises(DiskFull, match="delete jobs or uploads") as caught:
        library.uploads.create("b", 501)
    assert caught.value.retry_after_s
    library.uploads.append(state.upload_id, 0, b"x" * 1000)  # an upload that was begun goes on
    monkeypatch.setattr(room, "free_bytes", lambda: 2000)
    library.uploads.create("b", 500)


def test_several_threads_get_one_answer_each(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data))
    with ThreadPoolExecutor(8) as threads:
        states = list(threads.map(lambda _: library.uploads.append(state.upload_id, 0, data), range(8)))
        stored = set(threads.map(lambda _: library.uploads.finalize(state.upload_id, sha256_of(data)), range(8)))
    assert {after.next_offset for after in states} == {len(data)}
    assert len(stored) == 1


def test_upload_ids_cannot_be_guessed_and_name_no_file(library: AdapterLibrary, tmp_path: Path) -> None:
    first, second = (library.uploads.create("a", 10).upload_id for _ in range(2))
    assert first != second
    assert len(first) >= 32
    assert not any(first in name or second in name for name in parts(tmp_path))
    for upload_id in ("", "../x", first[:-1], parts(tmp_path)[0]):
        with pytest.raises(UploadNotFound):
            library.uploads.append(upload_id, 0, b"x")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/a.safetensors", "a.safetensors"),
        ("C:\\loras\\b.safetensors", "b.safetensors"),
        ("a\x1b[31m\n\u202e\x00.safetensors", "a�[31m���.safetensors"),
        ("x" * 300, "x" * 199 + "…"),
        ("", ""),
    ],
)
def test_a_clients_file_name_is_text_to_show(library: AdapterLibrary, given: str, shown: str) -> None:
    assert display_name(given) == shown
    assert upload(library, adapter_bytes(), given).filename == shown
    assert library.listing().loras[0].filename == shown
