"""The adapters that requests can name: by which names, in which order, and what can be deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.domain.errors import ChromaError, InvalidParameter, LoraNotFound
from tests.adapters.libraries import adapter_bytes, open_library, paths, sha256_of, upload


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


def test_uploads_outlive_the_process(library: AdapterLibrary, root: Path, tmp_path: Path) -> None:
    lora = upload(library, adapter_bytes())
    assert open_library(root, tmp_path / "data").listing().loras == (lora,)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "g" * 64, "0" * 64 + "\n", f"sha256:{'0' * 64}"])
def test_what_is_no_hash_is_refused(library: AdapterLibrary, sha256: str) -> None:
    for call in (library.find, lambda text: library.uploads.create("a", 1, text)):
        with pytest.raises(InvalidParameter, match="64 hexadecimal digits"):
            call(sha256)


def test_a_note_that_was_changed_is_shown_no_less_carefully(library: AdapterLibrary, tmp_path: Path) -> None:
    lora = upload(library, adapter_bytes())
    note = tmp_path / "data" / "loras" / f"{lora.sha256}.json"
    for text, shown in (('{"filename": "a\\u001b"}', "a�"), ('{"filename": 3}', ""), ('{"owners": {"": 3}}', "")):
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
        lambda: library.uploads.create("a", 10**9),
        lambda: library.uploads.append("no", 0, b"x"),
    ):
        with pytest.raises(ChromaError) as caught:
            call()
        messages.append(str(caught.value))
    assert not any(str(tmp_path) in message for message in messages)
