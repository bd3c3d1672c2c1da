"""The adapters of a server: what lies where, what an upload may do, and that nothing leaves its folder."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from chromarpc_server.adapters import root as adapter_root
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary, LoraSource, StoredLora, display_name
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.errors import (
    ChromaError,
    InvalidParameter,
    LoraInvalid,
    LoraNotFound,
    UploadNotFound,
    UploadOutOfOrder,
    UploadsFull,
)
from chromarpc_server.domain.limits import UploadLimits
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.pipeline.adapters import require_adapter_file

LIMITS = UploadLimits(max_file_bytes=4000, max_total_bytes=6000, max_chunk_bytes=1000, max_open=2, expiry_s=60)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def adapter_bytes(seed: int = 0) -> bytes:
    """A small adapter file, different for each seed."""
    return save(
        {
            "diffusion_model.img_in.lora_A.weight": torch.full((2, 4), float(seed)),
            "diffusion_model.img_in.lora_B.weight": torch.ones(8, 2),
        }
    )


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def library(root: Path, tmp_path: Path, clock: Clock) -> AdapterLibrary:
    return AdapterLibrary(root, tmp_path / "data", LIMITS, downloads=tmp_path / "downloads", clock=clock)


def upload(library: AdapterLibrary, data: bytes, filename: str = "a.safetensors", chunk: int = 100) -> StoredLora:
    state = library.create_upload(filename, len(data))
    for offset in range(0, len(data), chunk):
        assert library.append(state.upload_id, offset, data[offset : offset + chunk]).next_offset > offset
    return library.finalize(state.upload_id, sha256_of(data))


def parts(tmp_path: Path) -> list[str]:
    folder = tmp_path / "data" / "uploads"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def paths(library: AdapterLibrary) -> list[str]:
    return [lora.path for lora in library.listing().loras]


def test_an_upload_is_kept_under_its_hash(library: AdapterLibrary, tmp_path: Path) -> None:
    data = adapter_bytes()
    lora = upload(library, data)
    assert (lora.path, lora.source) == (f"sha256:{sha256_of(data)}", LoraSource.UPLOAD)
    assert (lora.filename, lora.size_bytes, lora.sha256) == ("a.safetensors", len(data), sha256_of(data))
    assert library.locate(lora.path, "path").path.read_bytes() == data
    assert library.listing().loras == (lora,)
    assert parts(tmp_path) == []


def test_nothing_is_written_before_the_first_upload(library: AdapterLibrary, tmp_path: Path) -> None:
    library.clean()
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


async def test_a_file_below_the_root_can_be_named_by_its_hash(library: AdapterLibrary, root: Path) -> None:
    (root / "job").mkdir()
    for seed, name in enumerate(("a.safetensors", "job/b.safetensors")):
        (root / name).write_bytes(adapter_bytes(seed))
    for seed, name in enumerate(("a.safetensors", "job/b.safetensors")):
        found = await library.look_up(f"sha256:{sha256_of(adapter_bytes(seed))}", "path", "anybody")
        assert found.path == root / name
    assert [lora.sha256 for lora in library.listing().loras] == [sha256_of(adapter_bytes(seed)) for seed in (0, 1)]
    with pytest.raises(LoraNotFound, match=r"no adapter with this hash$"):
        await library.look_up(f"sha256:{sha256_of(b'')}", "path")


async def test_a_hash_below_the_root_follows_the_file(library: AdapterLibrary, root: Path) -> None:
    file = root / "a.safetensors"
    file.write_bytes(adapter_bytes(0))
    old, new = (f"sha256:{sha256_of(adapter_bytes(seed))}" for seed in (0, 1))
    assert (await library.look_up(old, "path")).path == file
    file.write_bytes(adapter_bytes(1))
    os.utime(file, ns=(0, 0))
    assert (await library.look_up(new, "path")).path == file
    with pytest.raises(LoraNotFound):
        await library.look_up(old, "path")
    file.unlink()
    with pytest.raises(LoraNotFound):
        await library.look_up(new, "path")


async def test_a_file_whose_hash_is_known_is_not_read_again(
    library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = root / "a.safetensors"
    file.write_bytes(adapter_bytes())
    library.learn(AdapterFile.of(file, "path"), "ab" * 32)
    monkeypatch.setattr(AdapterFile, "open", lambda _file: pytest.fail("it was read"))
    assert (await library.look_up("sha256:" + "ab" * 32, "path")).path == file
    assert library.listing().loras[0].sha256 == "ab" * 32
    with pytest.raises(LoraNotFound):
        await library.look_up("sha256:" + "cd" * 32, "path")


@contextmanager
def as_nobody() -> Iterator[None]:
    """What is only the superuser's may not be read meanwhile, whoever runs the tests."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_root_that_cannot_be_read_answers_as_if_nothing_were_there(library: AdapterLibrary, root: Path) -> None:
    (root / "a.safetensors").write_bytes(adapter_bytes())
    root.chmod(0)
    try:
        with as_nobody():
            for path in ("a.safetensors", "b.safetensors"):
                with pytest.raises(LoraNotFound) as caught:
                    library.locate(path, "path")
                assert str(root) not in caught.value.message
            assert library.listing().loras == ()
    finally:
        root.chmod(0o700)


def test_a_file_that_cannot_be_read_is_told_without_its_path(root: Path) -> None:
    file = root / "a.safetensors"
    file.write_bytes(adapter_bytes())
    file.chmod(0)
    with as_nobody(), pytest.raises(LoraInvalid, match="cannot be read: Permission denied") as caught:
        require_adapter_file(file)
    assert str(root) not in caught.value.message


async def test_a_pipe_below_the_root_keeps_nobody_waiting(library: AdapterLibrary, root: Path) -> None:
    os.mkfifo(root / "pipe.safetensors")
    for path in ("pipe.safetensors", f"sha256:{sha256_of(b'')}"):
        with pytest.raises(LoraNotFound):
            await library.look_up(path, "path")
    assert library.listing().loras == ()


def test_uploads_outlive_the_process(library: AdapterLibrary, root: Path, tmp_path: Path) -> None:
    lora = upload(library, adapter_bytes())
    assert AdapterLibrary(root, tmp_path / "data").listing().loras == (lora,)


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
    state = library.create_upload("a", len(data))
    library.append(state.upload_id, 0, data)
    with pytest.raises(LoraInvalid, match="another hash") as caught:
        library.finalize(state.upload_id, "0" * 64)
    assert caught.value.violations[0].field == "sha256"
    with pytest.raises(UploadNotFound):
        library.append(state.upload_id, 0, data)
    assert parts(tmp_path) == []


def test_the_hash_that_was_announced_counts_as_well(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.create_upload("a", len(data), "0" * 64)
    library.append(state.upload_id, 0, data)
    with pytest.raises(LoraInvalid, match="another hash"):
        library.finalize(state.upload_id, sha256_of(data))


@pytest.mark.parametrize("sha256", ["", "0" * 63, "g" * 64, "0" * 64 + "\n", f"sha256:{'0' * 64}"])
def test_what_is_no_hash_is_refused(library: AdapterLibrary, sha256: str) -> None:
    for call in (library.find, lambda text: library.create_upload("a", 1, text)):
        with pytest.raises(InvalidParameter, match="64 hexadecimal digits"):
            call(sha256)


@pytest.mark.parametrize("size", [0, 4001, 2**63])
def test_a_size_out_of_bounds_is_refused_before_any_byte(library: AdapterLibrary, size: int) -> None:
    with pytest.raises(InvalidParameter, match="between 1 and 4000"):
        library.create_upload("a", size)


def test_uploads_can_be_switched_off(root: Path, tmp_path: Path) -> None:
    closed = AdapterLibrary(root, tmp_path / "data", UploadLimits(max_file_bytes=0))
    with pytest.raises(InvalidParameter, match="takes no uploads"):
        closed.create_upload("a", 1)


@pytest.mark.parametrize("count", [0, 1001])
def test_a_chunk_out_of_bounds_is_refused(library: AdapterLibrary, count: int) -> None:
    state = library.create_upload("a", 2000)
    with pytest.raises(InvalidParameter, match="1 to 1000 bytes"):
        library.append(state.upload_id, 0, b"x" * count)


def test_more_bytes_than_announced_are_refused(library: AdapterLibrary) -> None:
    state = library.create_upload("a", 10)
    with pytest.raises(InvalidParameter, match="ends at byte 11"):
        library.append(state.upload_id, 0, b"x" * 11)


def test_a_chunk_may_come_again_and_only_the_same(library: AdapterLibrary) -> None:
    state = library.create_upload("a", 100)
    library.append(state.upload_id, 0, b"abcdef")
    assert library.append(state.upload_id, 0, b"abcdef").next_offset == 6
    assert library.append(state.upload_id, 2, b"cd").next_offset == 6
    with pytest.raises(UploadOutOfOrder):
        library.append(state.upload_id, 0, b"abcdeX")


@pytest.mark.parametrize("offset", [3, 5, 7, 2**64 - 1])
def test_bytes_out_of_order_are_told_where_to_go_on(library: AdapterLibrary, offset: int) -> None:
    state = library.create_upload("a", 2**12 - 96)
    library.append(state.upload_id, 0, b"abcdef")
    with pytest.raises((UploadOutOfOrder, InvalidParameter)) as caught:
        library.append(state.upload_id, offset, b"ghijkl")
    if offset < 4000:
        assert caught.value.metadata == {"expected_offset": "6"}
    assert library.append(state.upload_id, 6, b"ghijkl").next_offset == 12


def test_missing_bytes_leave_the_upload_as_it_is(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.create_upload("a", len(data))
    library.append(state.upload_id, 0, data[:50])
    with pytest.raises(UploadOutOfOrder, match="begins at byte 50"):
        library.finalize(state.upload_id, sha256_of(data))
    library.append(state.upload_id, 50, data[50:])
    assert library.finalize(state.upload_id, sha256_of(data)).size_bytes == len(data)


def test_the_end_may_be_asked_for_again(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.create_upload("a", len(data))
    library.append(state.upload_id, 0, data)
    first = library.finalize(state.upload_id, sha256_of(data))
    assert library.finalize(state.upload_id, sha256_of(data).upper()) == first
    with pytest.raises(UploadNotFound):
        library.finalize(state.upload_id, "0" * 64)
    library.delete(first.path)
    with pytest.raises(LoraNotFound, match="deleted after"):
        library.finalize(state.upload_id, sha256_of(data))


def test_an_abandoned_upload_expires_and_each_chunk_puts_that_off(
    library: AdapterLibrary, clock: Clock, tmp_path: Path
) -> None:
    state = library.create_upload("a", 100)
    clock.now += 59
    assert library.append(state.upload_id, 0, b"x").expires.timestamp() == clock.now + 60
    clock.now += 59
    library.append(state.upload_id, 1, b"x")
    clock.now += 60
    with pytest.raises(UploadNotFound):
        library.append(state.upload_id, 2, b"x")
    library.clean()
    assert parts(tmp_path) == []


def test_a_start_removes_what_an_earlier_process_left_and_nothing_younger(
    library: AdapterLibrary, root: Path, clock: Clock, tmp_path: Path
) -> None:
    library.create_upload("a", 100)
    library.create_upload("b", 100)
    old, young = parts(tmp_path)
    folder = tmp_path / "data" / "uploads"
    os.utime(folder / old, (clock.now - 61, clock.now - 61))
    os.utime(folder / young, (clock.now - 30, clock.now - 30))
    AdapterLibrary(root, tmp_path / "data", LIMITS, clock=clock).clean()
    assert parts(tmp_path) == [young]


def test_only_so_many_uploads_are_open_at_once(library: AdapterLibrary, clock: Clock) -> None:
    library.create_upload("a", 10)
    library.create_upload("b", 10)
    with pytest.raises(UploadsFull) as caught:
        library.create_upload("c", 10)
    assert caught.value.retry_after_s
    clock.now += 60
    library.create_upload("c", 10)


def test_uploads_share_a_bound_with_what_is_still_to_come(library: AdapterLibrary) -> None:
    lora = upload(library, adapter_bytes())
    library.create_upload("a", 4000)
    room = 6000 - 4000 - lora.size_bytes
    with pytest.raises(UploadsFull, match="delete some"):
        library.create_upload("b", room + 1)
    library.create_upload("b", room)


def test_a_full_disk_is_told_and_the_upload_goes_on_later(
    library: AdapterLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = library.create_upload("a", 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UploadsFull, match="disk has no room"):
            library.append(state.upload_id, 0, b"x")
    assert library.append(state.upload_id, 0, b"x").next_offset == 1


def test_several_threads_get_one_answer_each(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.create_upload("a", len(data))
    with ThreadPoolExecutor(8) as threads:
        states = list(threads.map(lambda _: library.append(state.upload_id, 0, data), range(8)))
        stored = set(threads.map(lambda _: library.finalize(state.upload_id, sha256_of(data)), range(8)))
    assert {after.next_offset for after in states} == {len(data)}
    assert len(stored) == 1


def test_upload_ids_cannot_be_guessed_and_name_no_file(library: AdapterLibrary, tmp_path: Path) -> None:
    first, second = (library.create_upload("a", 10).upload_id for _ in range(2))
    assert first != second
    assert len(first) >= 32
    assert not any(first in name or second in name for name in parts(tmp_path))
    for upload_id in ("", "../x", first[:-1], parts(tmp_path)[0]):
        with pytest.raises(UploadNotFound):
            library.append(upload_id, 0, b"x")


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


def test_a_note_that_was_changed_is_shown_no_less_carefully(library: AdapterLibrary, tmp_path: Path) -> None:
    lora = upload(library, adapter_bytes())
    note = tmp_path / "data" / "loras" / f"{lora.sha256}.json"
    for text, shown in (('{"filename": "a\\u001b"}', "a�"), ("[1]", ""), ("{", ""), ('{"filename": 3}', "")):
        note.write_text(text)
        assert library.listing().loras[0].filename == shown


def test_deleting_an_upload_leaves_nothing(library: AdapterLibrary, tmp_path: Path) -> None:
    lora = upload(library, adapter_bytes())
    library.delete(lora.path)
    assert list((tmp_path / "data" / "loras").iterdir()) == []
    with pytest.raises(LoraNotFound):
        library.locate(lora.path, "path")
    with pytest.raises(LoraNotFound):
        library.delete(lora.path)


def test_only_uploads_can_be_deleted(library: AdapterLibrary, root: Path, tmp_path: Path) -> None:
    (root / "a.safetensors").write_bytes(adapter_bytes())
    downloaded = tmp_path / "downloads" / f"{sha256_of(adapter_bytes())}.safetensors"
    downloaded.parent.mkdir()
    downloaded.write_bytes(adapter_bytes())
    for path in ("a.safetensors", f"sha256:{downloaded.stem}", "", "../x", f"sha256:../{'0' * 64}"):
        with pytest.raises(InvalidParameter):
            library.delete(path)
    assert (root / "a.safetensors").exists()
    assert downloaded.exists()


def test_the_list_has_root_then_uploads_then_downloads(
    library: AdapterLibrary, root: Path, tmp_path: Path
) -> None:
    for path in ("b.safetensors", "a/z.safetensors", "a/deep/er/y.safetensors", "notes.txt", "a/x.SAFETENSORS"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"anything")
    uploaded = upload(library, adapter_bytes(1))
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for name in (f"{'a' * 64}.safetensors", f"{uploaded.sha256}.safetensors", "short.safetensors", f"{'b' * 64}"):
        (downloads / name).write_bytes(b"x")
    assert paths(library) == [
        "a/deep/er/y.safetensors", "a/z.safetensors", "b.safetensors", uploaded.path, f"sha256:{'a' * 64}",
    ]  # fmt: skip
    assert not library.listing().truncated
    for path in paths(library):
        library.locate(path, "path")


def test_links_are_listed_only_where_they_stay_inside(library: AdapterLibrary, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.safetensors").write_bytes(b"x")
    (root / "a.safetensors").write_bytes(b"x")
    (root / "inside.safetensors").symlink_to(root / "a.safetensors")
    (root / "outside.safetensors").symlink_to(secret)
    (root / "broken.safetensors").symlink_to(root / "nothing")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    assert paths(library) == ["a.safetensors", "inside.safetensors"]


def test_what_no_request_can_name_is_not_listed(library: AdapterLibrary, root: Path) -> None:
    (root / f"sha256:{'0' * 64}.safetensors").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.safetensors")).write_bytes(b"x")
    assert paths(library) == []


def test_looking_is_bounded_in_depth_and_number(
    library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = root.joinpath(*"123456789")
    deep.mkdir(parents=True)
    (deep / "a.safetensors").write_bytes(b"x")
    assert paths(library) == []
    assert library.listing().truncated
    monkeypatch.setattr(adapter_root, "MAX_FILES", 3)
    for index in range(5):
        (root / f"{index}.safetensors").write_bytes(b"x")
    assert len(paths(library)) == 3


@pytest.mark.parametrize(
    "path",
    [
        "sha256:", f"sha256:{'0' * 64}", f"sha256:{'A' * 64}", f"sha256:{'0' * 63}/", f"sha256:../{'0' * 61}",
        f"sha256:{'0' * 64}\n", "../data/loras/x", "/etc/passwd", "a\0b", "", ".",
        "sha256:../../root/a.safetensors",
    ],
)  # fmt: skip
def test_no_path_leaves_the_library(library: AdapterLibrary, root: Path, path: str) -> None:
    (root / "a.safetensors").write_bytes(b"x")
    with pytest.raises(LoraNotFound) as caught:
        library.locate(path, "loras.0.path")
    assert caught.value.violations[0].field == "loras.0.path"
    assert str(root) not in str(caught.value)


def test_a_link_among_the_uploads_is_not_followed(library: AdapterLibrary, tmp_path: Path) -> None:
    upload(library, adapter_bytes())
    link = tmp_path / "data" / "loras" / f"{'1' * 64}.safetensors"
    link.symlink_to(tmp_path / "data" / "loras" / f"{sha256_of(adapter_bytes())}.safetensors")
    with pytest.raises(LoraNotFound):
        library.locate(f"sha256:{'1' * 64}", "path")
    assert len(library.listing().loras) == 1


def test_no_error_names_the_servers_folders(library: AdapterLibrary, tmp_path: Path) -> None:
    messages: list[str] = []
    for call in (
        lambda: library.locate("../x", "path"),
        lambda: library.delete("x"),
        lambda: upload(library, b"x" * 20),
        lambda: library.create_upload("a", 10**9),
        lambda: library.append("no", 0, b"x"),
    ):
        with pytest.raises(ChromaError) as caught:
            call()
        messages.append(str(caught.value))
    assert not any(str(tmp_path) in message for message in messages)


async def answer_to(library: AdapterLibrary, path: str) -> Path | str:
    """The file that a path names, or what is said of it."""
    try:
        (found,) = (await AdapterSources(library, None).find([PlannedLora(path, 1.0)])).files
    except LoraNotFound as error:
        return error.message
    assert found is not None
    return found.path


async def test_an_absolute_path_below_the_root_is_taken_as_the_relative_one(
    library: AdapterLibrary, root: Path, tmp_path: Path
) -> None:
    file = root / "job" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"x")
    (root / "link.safetensors").symlink_to(file)
    for path in (f"{file}", f"/{file}", f"{root}//job/./a.safetensors", f"{root}/link.safetensors"):
        assert await answer_to(library, path) == file, path
    (tmp_path / "linked").symlink_to(root)
    linked = AdapterLibrary(tmp_path / "linked", tmp_path / "data")
    for folder in (root, tmp_path / "linked"):
        assert await answer_to(linked, f"{folder}/job/a.safetensors") == file


async def test_every_other_absolute_path_gets_one_answer_and_is_not_looked_at(
    library: AdapterLibrary, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "folder").mkdir()
    (root / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.safetensors").write_bytes(b"x")
    below = [f"{root}", f"{root}/", f"{root}/none.safetensors", f"{root}/folder", f"{root}/out.safetensors"]
    outside = [
        f"{tmp_path}/secret.safetensors", f"{tmp_path}/none.safetensors", f"{tmp_path}/root2/a.safetensors",
        f"{root}/../secret.safetensors", f"{root}/../root/folder", "/etc/passwd", "/etc", "/none", "/",
        f"{tmp_path}".upper(), f"{root}/a\0b",
    ]  # fmt: skip
    answers = {await answer_to(library, path) for path in below}
    monkeypatch.setattr(Path, "resolve", lambda *_, **__: pytest.fail("it was looked at"))
    answers |= {await answer_to(library, path) for path in outside}
    (answer,) = answers
    assert isinstance(answer, str)
    assert answer.endswith("; give its path relative to that root, or an absolute one below it")
    assert str(tmp_path) not in answer
