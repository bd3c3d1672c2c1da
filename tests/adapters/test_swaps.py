"""What is read is what was found below the root, whatever is swapped for a link between looking and opening."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.domain.errors import LoraChanged, LoraInvalid, LoraNotFound
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.runtime.adapter_cache import AdapterCache
from tests.adapters.libraries import open_library
from tests.tiny_checkpoint import GOLDENS

TARGETS = {
    name: tuple(tensor.shape)
    for name, tensor in load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors").items()
}
FORMATS = GOLDENS / "adapters"
INSIDE, OUTSIDE = "inside", "OUTSIDE"
PATH = "job/a.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`job/a.safetensors`, and outside of the root another adapter of the same name."""
    for folder, name in ((tmp_path / "root" / "job", "aitk"), (tmp_path / "outside", "kohya")):
        folder.mkdir(parents=True)
        shutil.copyfile(FORMATS / f"{name}.safetensors", folder / "a.safetensors")
    return tmp_path / "root"


@pytest.fixture
def library(root: Path, tmp_path: Path) -> AdapterLibrary:
    return open_library(root, tmp_path / "data")


async def read(library: AdapterLibrary, path: str = PATH) -> str:
    """Where the bytes come from that a request of `path` gets; the error's name where it gets none."""
    try:
        found = await AdapterSources(library, None).find([PlannedLora(path, 1.0)])
        assert found.files[0] is not None
        return origin(found.files[0])
    except LoraNotFound as error:
        return type(error).__name__


def origin(file: AdapterFile) -> str:
    try:
        adapter = AdapterCache(10**9).read(file, "1", TARGETS, check=lambda: None)
    except (LoraChanged, LoraInvalid) as error:
        return type(error).__name__
    return INSIDE if adapter.format == "ai-toolkit LoRA" else OUTSIDE


class FileSwap:
    """The file itself becomes a link to the one outside, and the same file again."""

    def __init__(self, root: Path) -> None:
        self._file, self._link, self._kept = root / PATH, root.parent / "link", root.parent / "kept"
        os.link(self._file, self._kept)
        self._target = root.parent / "outside" / "a.safetensors"

    def swap(self) -> None:
        self._link.symlink_to(self._target)
        self._link.replace(self._file)

    def back(self) -> None:
        os.link(self._kept, self._link)
        self._link.replace(self._file)
        self._link.unlink(missing_ok=True)  # two names of one file: nothing was renamed


class FolderSwap:
    """The folder that it lies in becomes a link to the one outside, and the same folder again."""

    def __init__(self, root: Path) -> None:
        self._folder, self._link, self._kept = root / "job", root.parent / "link", root.parent / "kept"
        self._link.symlink_to(root.parent / "outside")

    def swap(self) -> None:
        self._folder.rename(self._kept)
        self._link.rename(self._folder)

    def back(self) -> None:
        self._folder.rename(self._link)
        self._kept.rename(self._folder)


Swap = FileSwap | FolderSwap
swaps = pytest.mark.parametrize("kind", [FileSwap, FolderSwap])


@swaps
async def test_a_link_put_there_after_the_path_was_checked_is_not_followed(
    kind: Callable[[Path], Swap], library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await read(library) == INSIDE
    swap, resolve, resolved = kind(root), Path.resolve, []

    def resolve_then_swap(path: Path, strict: bool = False) -> Path:
        found = resolve(path, strict)
        resolved.append(found)
        if len(resolved) == 1:
            swap.swap()
        return found

    monkeypatch.setattr(Path, "resolve", resolve_then_swap)
    assert await read(library) == "LoraNotFound"
    assert resolved[0] == root / PATH


@swaps
async def test_a_link_that_is_there_only_while_the_file_is_opened_is_not_followed(
    kind: Callable[[Path], Swap], library: AdapterLibrary, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (await AdapterSources(library, None).find([PlannedLora(PATH, 1.0)])).files
    assert file is not None
    swap, plain_open, opened = kind(root), os.open, []

    def open_swapped(path: Any, *args: Any, **options: Any) -> int:
        if os.fspath(path) not in ("job", "a.safetensors", str(root / PATH)):
            return plain_open(path, *args, **options)
        swap.swap()
        opened.append(path)
        try:
            return plain_open(path, *args, **options)
        finally:
            swap.back()

    monkeypatch.setattr(os, "open", open_swapped)
    assert origin(file) == "LoraChanged"
    assert opened


@swaps
async def test_a_link_put_there_while_the_job_waits_is_not_followed(
    kind: Callable[[Path], Swap], library: AdapterLibrary, root: Path
) -> None:
    (file,) = (await AdapterSources(library, None).find([PlannedLora(PATH, 1.0)])).files
    assert file is not None
    swap = kind(root)
    swap.swap()
    assert origin(file) == "LoraChanged"
    assert await read(library) == "LoraNotFound"
    swap.back()
    assert origin(file) == INSIDE


@pytest.mark.slow
@swaps
async def test_nothing_outside_is_read_while_links_come_and_go(
    kind: Callable[[Path], Swap], library: AdapterLibrary, root: Path
) -> None:
    swap, is_over = kind(root), threading.Event()

    def attack() -> None:
        while not is_over.is_set():
            swap.swap()
            swap.back()

    attacker = threading.Thread(target=attack)
    attacker.start()
    outcomes: list[str] = []
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until and (len(outcomes) < 400 or INSIDE not in outcomes):
            outcomes.append(await read(library))
    finally:
        is_over.set()
        attacker.join()
    assert outcomes.count(OUTSIDE) == 0
    assert INSIDE in outcomes


async def test_links_that_stay_inside_are_followed(library: AdapterLibrary, root: Path) -> None:
    (root / "relative.safetensors").symlink_to(PATH)
    (root / "absolute.safetensors").symlink_to(root / PATH)
    (root / "chain.safetensors").symlink_to("absolute.safetensors")
    (root / "job" / "up.safetensors").symlink_to("../job/a.safetensors")
    (root / "folder").symlink_to("job")
    (root / "whole").symlink_to(root / "job", target_is_directory=True)
    for path in ("relative", "absolute", "chain", "job/up", "folder/a", "whole/a", "whole/up"):
        assert await read(library, f"{path}.safetensors") == INSIDE, path
    listed = {lora.path for lora in library.listing().loras}
    assert listed == {f"{path}.safetensors" for path in ("job/a", "job/up", "relative", "absolute", "chain")}


async def test_a_root_reached_through_a_link_is_served(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    library = open_library(tmp_path / "linked", tmp_path / "data")
    for path in (PATH, str(tmp_path / "linked" / PATH), str(root / PATH)):
        assert await read(library, path) == INSIDE


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may list any folder")
async def test_a_folder_that_may_be_entered_and_not_listed_is_served(library: AdapterLibrary, root: Path) -> None:
    (root / "job").chmod(0o300)
    try:
        assert await read(library) == INSIDE
    finally:
        (root / "job").chmod(0o700)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
async def test_a_pipe_or_a_device_in_the_files_place_keeps_nobody_waiting(
    make: Callable[[Path], None], library: AdapterLibrary, root: Path
) -> None:
    (file,) = (await AdapterSources(library, None).find([PlannedLora(PATH, 1.0)])).files
    assert file is not None
    (root / PATH).unlink()
    make(root / PATH)
    assert origin(file) == "LoraChanged"
    assert await read(library) == "LoraNotFound"


def test_a_listing_does_not_walk_into_a_folder_that_became_a_link(
    library: AdapterLibrary, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap, plain_scandir, walked = FolderSwap(root), os.scandir, []

    def scan_swapped(folder: Any) -> Any:
        if len(walked) == 1:
            swap.swap()
        walked.append(os.stat(folder).st_ino)  # noqa: PTH116 - it may be a descriptor
        return plain_scandir(folder)

    monkeypatch.setattr(os, "scandir", scan_swapped)
    assert library.listing().loras == ()
    assert len(walked) == 2
    assert (tmp_path / "outside").stat().st_ino not in walked
