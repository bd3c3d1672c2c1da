"""The folder that paths are relative to: what is found below it, and that nothing outside is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chromarpc_server.adapters import root as adapter_root
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.errors import LoraInvalid, LoraNotFound
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.pipeline.adapters import require_adapter_file
from tests.adapters.libraries import adapter_bytes, open_library, paths, sha256_of


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
    linked = open_library(tmp_path / "linked", tmp_path / "data")
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
