"""Whose a file is: noted with a checksum, synced before the file is placed, and never everybody's by accident."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chromarpc_server.adapters import owners as notes
from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.damage import damaged_adapters
from chromarpc_server.adapters.stored_lora import LoraSource
from tests.adapters.libraries import flip_a_bit

DATA = b"the bytes of an adapter"
SHA256 = hashlib.sha256(DATA).hexdigest()


class Cut(BaseException):
    """The process is killed here: it does nothing any more."""


def store_in(folder: Path) -> ContentStore:
    store = ContentStore(folder / "loras", LoraSource.UPLOAD, folder / "uploads")
    store.make_folder()
    return store


def part_of(folder: Path) -> Path:
    part = folder / "received"
    part.write_bytes(DATA)
    return part


def add(store: ContentStore, owner: str, filename: str = "a") -> None:
    store.add(part_of(store.folder.parent), SHA256, owner, filename)


def note(store: ContentStore) -> Path:
    return store.path(SHA256).with_suffix(".json")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ContentStore]:
    store = store_in(tmp_path)
    yield store
    store.unfinished.close()


def test_a_note_has_the_hash_of_its_owners(store: ContentStore) -> None:
    add(store, "alice", "ä")
    add(store, "Bob", "b")
    noted = json.loads(note(store).read_text())
    canonical = json.dumps({"Bob": "b", "alice": "ä"}, sort_keys=True, separators=(",", ":"))
    assert noted == {
        "owners": {"alice": "ä", "Bob": "b"},
        "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: note.write_text(note.read_text().replace("alice", "mally")),
        lambda note: note.write_text(note.read_text().replace('"sha256"', '"sha25&"')),
        lambda note: note.write_text(note.read_text()[:-1]),
        lambda note: note.write_text("[1]"),
        lambda note: note.write_text('{"owners": ["alice"]}'),
        lambda note: note.write_bytes(b"\0" * 100),
        lambda note: note.write_bytes(b""),
        lambda note: flip_a_bit(note, 14),
    ],
    ids=["owner", "key", "cut", "list", "no names", "zeros", "empty", "bit"],
)
def test_a_damaged_note_makes_the_file_nobodys_until_its_bytes_come_again(
    damage: Callable[[Path], object], store: ContentStore
) -> None:
    add(store, "alice")
    before = damaged_adapters()
    damage(note(store))
    for caller in ("alice", "mally", "bob", ""):
        assert store.find(SHA256, caller) is None
        assert store.locate(SHA256, caller) is None
        assert not store.remove_owner(SHA256, caller)
        assert store.hidden_from(caller) == {SHA256}
    assert store.total_bytes() == len(DATA)
    assert damaged_adapters() == before + 1
    add(store, "alice")
    assert store.find(SHA256, "alice") is not None
    assert store.find(SHA256, "mally") is None


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ('{"owners": {"alice": "a"}}', {"alice": "a"}),
        ('{"filename": "a"}', {"": "a"}),
        (None, {"": ""}),
    ],
)
def test_notes_of_earlier_versions_mean_what_they_meant(
    text: str | None, owners: dict[str, str], store: ContentStore
) -> None:
    store.path(SHA256).write_bytes(DATA)
    if text is not None:
        note(store).write_text(text)
    assert notes.owners_of(store.path(SHA256)) == owners


def test_a_note_that_cannot_be_read_now_shows_the_file_to_nobody_and_is_not_replaced(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "alice")
    before, text = damaged_adapters(), note(store).read_text()

    def fail(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert store.find(SHA256, "alice") is None
        for change in (lambda: add(store, "bob"), lambda: store.remove_owner(SHA256, "alice")):
            with pytest.raises(OSError, match="Too many"):
                change()
    assert note(store).read_text() == text
    assert damaged_adapters() == before


CHANGES: dict[str, Callable[[ContentStore], object]] = {
    "the first upload": lambda store: add(store, "alice"),
    "another owner's": lambda store: add(store, "bob"),
    "a download": lambda store: store.place(part_of(store.folder.parent), SHA256),
    "a download's owner": lambda store: store.add_owner(SHA256, "bob"),
    "one of two owners leaves": lambda store: store.remove_owner(SHA256, "alice"),
    "the last owner leaves": lambda store: store.remove_owner(SHA256, "alice"),
}
OWNERS_BEFORE = {
    "the first upload": (),
    "another owner's": ("alice",),
    "a download": (),
    "a download's owner": ("alice",),
    "one of two owners leaves": ("alice", "bob"),
    "the last owner leaves": ("alice",),
}
MAY_SEE = {
    "the first upload": {"alice"},
    "another owner's": {"alice", "bob"},
    "a download": set(),
    "a download's owner": {"alice", "bob"},
    "one of two owners leaves": {"alice", "bob"},
    "the last owner leaves": {"alice"},
}
MUST_SEE = {
    "the first upload": set(),
    "another owner's": {"alice"},
    "a download": set(),
    "a download's owner": {"alice"},
    "one of two owners leaves": {"bob"},
    "the last owner leaves": set(),
}
CALLS = ("replace", "rename", "unlink", "fsync", "mkdir", "utime")


def cut_at(monkeypatch: pytest.MonkeyPatch, last: int) -> list[str]:
    """From the call numbered `last` on, nothing reaches the disk; the calls that did, by name."""
    done: list[str] = []

    def guard(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if len(done) >= last:
                raise Cut
            done.append(name)
            return plain(*arguments, **keywords)

        return guarded

    for name in CALLS:
        monkeypatch.setattr(os, name, guard(name))
    return done


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_between_two_writes_shows_nobody_a_file_and_takes_it_from_nobody(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in range(100):
        folder = tmp_path / str(last)
        folder.mkdir()
        store = store_in(folder)
        for owner in OWNERS_BEFORE[change]:
            add(store, owner)
        is_cut = False
        with monkeypatch.context() as patch:
            cut_at(patch, last)
            try:
                CHANGES[change](store)
            except Cut:
                is_cut = True
        after = store_in(folder)
        seen = {caller for caller in ("alice", "bob", "mally", "") if after.find(SHA256, caller)}
        if is_cut:
            assert MUST_SEE[change] <= seen <= MAY_SEE[change], last
        else:
            assert last > 3
            return
    raise AssertionError("it never came to an end")


def test_what_is_kept_is_synced_first_and_the_note_before_the_file(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.unfinished.path()
    done: list[str] = []

    def watch(name: str, target: Callable[..., str]) -> None:
        plain = getattr(os, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            done.append(f"{name} {target(*arguments)}")
            return plain(*arguments, **keywords)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink().suffix or "folder")
    watch("replace", lambda _, to: Path(to).suffix)
    watch("unlink", lambda path: Path(path).suffix)
    add(store, "alice")
    noted = ["fsync .note", "replace .json", "unlink .note", "fsync folder"]
    assert done == [*noted, "replace .safetensors", "fsync folder"]
    done.clear()
    store.remove_owner(SHA256, "alice")
    assert done == ["unlink .safetensors", "fsync folder", "unlink .json", "fsync folder"]


def test_a_disk_that_does_not_take_it_keeps_nothing(store: ContentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        add(store, "alice")
    assert store.find(SHA256, "alice") is None


@pytest.mark.parametrize("is_old", [False, True], ids=["with a checksum", "of an earlier version"])
def test_an_owner_leaves_on_a_full_disk(
    is_old: bool, tmp_path: Path, store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "alice", "a" * 20)
    add(store, "bob", "b")
    if is_old:
        note(store).write_text(json.dumps({"owners": {"bob": "b", "al": "a", "alice": "a"}}))
        assert store.remove_owner(SHA256, "al")
        note(store).write_text(json.dumps({"owners": {"bob": "b", "alice": "a"}}))
    size_bytes = note(store).stat().st_size
    fresh = store_in(tmp_path)  # a server that was started on the full disk
    plain_open = os.open

    def full(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_open(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", full)
    for server in (store, fresh):
        if server.remove_owner(SHA256, "alice"):
            assert note(store).stat().st_size <= size_bytes
    assert store.find(SHA256, "alice") is None
    found = store.find(SHA256, "bob")
    assert found is not None
    assert found.filename == "b"
    assert fresh.remove_owner(SHA256, "bob")
    assert not store.has(SHA256)
