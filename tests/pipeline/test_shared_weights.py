"""Files of weights that several devices load: opened, read and hashed once, and gone with the last of them."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.errors import JobCancelled, WeightsInvalid
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline import Checkpoint, CheckpointFiles, LoadContext, LoadProgress, WeightFiles
from chromarpc_server.pipeline.weights import loading, master, shared
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.master import read_master
from chromarpc_server.pipeline.weights.part import StoredPart, open_part
from chromarpc_server.pipeline.weights.reading import open_weights
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsFile
from chromarpc_server.pipeline.weights.shared import HostWeights
from chromarpc_server.pipeline.weights.stored import StoredWeights
from chromarpc_server.pipeline.weights.tensor_file import TensorFile

CPU = torch.device("cpu")
WAIT_S = 60
ON_DEVICE = MemoryPlan("float8", master="device", text_encoder="host", tile_autoencoder=False, record_graphs=True)
ON_HOST = replace(ON_DEVICE, master="host")


class _Disk:
    """Counts what is opened and what is hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.mapped: list[str] = []
        self.hashed: list[str] = []
        self._hash = master.tensor_hash
        self._map = SafetensorsFile.read
        monkeypatch.setattr(master, "tensor_hash", self._hash_counted)
        monkeypatch.setattr(SafetensorsFile, "read", lambda file, *_: self._map_counted(file))

    def open(self, path: Path) -> TensorFile:
        self.opened.append(path.name)
        return open_weights(path)

    def _map_counted(self, file: SafetensorsFile) -> Iterator[tuple[str, Tensor]]:
        self.mapped.append(file.path.name)
        return self._map(file)

    def _hash_counted(self, name: str, tensor: Tensor) -> str:
        self.hashed.append(name)
        return self._hash(name, tensor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> _Disk:
    return _Disk(monkeypatch)


@pytest.fixture
def files(tiny_checkpoint: Path, tmp_path: Path) -> CheckpointFiles:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    return CheckpointFiles(
        folder / "chroma-mini.safetensors", folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae"
    )


def _load(files: CheckpointFiles, weights: WeightFiles, context: LoadContext | None = None) -> Checkpoint:
    return Checkpoint.load(
        files, device=CPU, dtype=torch.float32, context=context or LoadContext(), weights=weights
    )


def _read(
    path: Path, weights: WeightFiles, plan: MemoryPlan | None, context: LoadContext | None = None
) -> tuple[StoredWeights, str, StoredPart]:
    part = open_part(path, "transformer", weights)
    reading = ReadingProgress((part,), context or LoadContext())
    return *read_master(reading, part, weights, CPU, plan), part


def _mapped(checkpoint: Checkpoint) -> HostWeights:
    """What the transformer's file is mapped as."""
    return next(held for held in checkpoint.shared if isinstance(held, HostWeights) and "img_in.weight" in held)


class _Meeting:
    """Loads that stop where they have read their first tensor, until they may go on."""

    def __init__(self) -> None:
        self.begun, self.may = threading.Event(), threading.Event()

    def context(self, error: Exception | None = None) -> LoadContext:
        def progress(_: LoadProgress) -> None:
            self.begun.set()
            assert self.may.wait(WAIT_S)
            if error is not None:
                raise error

        return LoadContext(progress=progress)


class _Check:
    """Of a load that waits: tells that it was looked at, and stops it once it shall."""

    def __init__(self) -> None:
        self.looked = threading.Semaphore(0)
        self.stops = False

    def __call__(self) -> None:
        self.looked.release()
        if self.stops:
            raise JobCancelled("")

    def wait_for_looks(self, count: int) -> None:
        for _ in range(count):
            assert self.looked.acquire(timeout=WAIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True], ids=["one-after-the-other", "at-once"])
def test_two_devices_open_read_and_hash_a_checkpoint_once(
    files: CheckpointFiles, disk: _Disk, at_once: bool
) -> None:
    weights, meeting, check = WeightFiles(disk.open), _Meeting(), _Check()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_load, files, weights, meeting.context())
        assert meeting.begun.wait(WAIT_S)
        if not at_once:
            meeting.may.set()
            one.result(WAIT_S)
        other = pool.submit(_load, files, weights, LoadContext(check=check))
        if at_once:
            check.wait_for_looks(3)
            assert len(disk.opened) == 3
        meeting.may.set()
        first, second = one.result(WAIT_S), other.result(WAIT_S)
    every = ["chroma-mini.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors"]
    assert sorted(disk.opened) == sorted(disk.mapped) == every
    assert len(disk.hashed) == len(set(disk.hashed)) == len(first.master)
    assert first.revision == second.revision
    assert {name: one.dense().data_ptr() for name, one in first.master.items()} == {
        name: one.dense().data_ptr() for name, one in second.master.items()
    }


@pytest.mark.slow
def test_what_the_host_has_of_a_checkpoint_goes_with_the_last_device_that_holds_it(
    files: CheckpointFiles, disk: _Disk
) -> None:
    weights = WeightFiles(disk.open)
    first, second = _load(files, weights), _load(files, weights)
    held = weakref.ref(_mapped(first))
    del first
    gc.collect()
    assert held() is _mapped(second)
    assert len(disk.opened) == 3
    del second
    gc.collect()
    assert held() is None
    _load(files, weights)
    assert len(disk.opened) == 6


@pytest.mark.parametrize("plan", [None, ON_DEVICE], ids=["mapped", "on-device"])
def test_a_file_that_was_written_anew_is_another_one(
    files: CheckpointFiles, plan: MemoryPlan | None, tmp_path: Path
) -> None:
    weights = WeightFiles()
    before, revision, part = _read(files.transformer, weights, plan)
    changed = {name: tensor + 1 for name, tensor in load_file(files.transformer).items()}
    save_file(changed, tmp_path / "new.safetensors", dict(part.files[0].header.metadata))
    (tmp_path / "new.safetensors").replace(files.transformer)
    after, other, _ = _read(files.transformer, weights, plan)
    assert revision != other
    assert torch.equal(after["img_in.weight"].dense(), before["img_in.weight"].dense() + 1)


def test_a_second_gpu_reads_by_the_same_descriptor_and_hashes_nothing(
    files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, calls = WeightFiles(), []
    real = loading.read_onto

    def read_onto(file: TensorFile, device: torch.device, descriptor: int, *, hashed: bool, **others: Any) -> Any:
        calls.append((descriptor, hashed))
        return real(file, device, descriptor, hashed=hashed, **others)

    monkeypatch.setattr(loading, "read_onto", read_onto)
    first, revision, part = _read(files.transformer, weights, ON_DEVICE)
    second, again = _read(files.transformer, weights, ON_DEVICE)[:2]
    assert [hashed for _, hashed in calls] == [True, False]
    assert calls[0][0] == calls[1][0]
    assert revision == again == _read(files.transformer, WeightFiles(), None)[1]
    assert all(torch.equal(first[name].dense(), second[name].dense()) for name in first)
    descriptor = calls[0][0]
    os.fstat(descriptor)
    del part
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def test_a_file_that_changed_in_place_after_it_was_hashed_is_not_taken_for_it(files: CheckpointFiles) -> None:
    weights = WeightFiles()
    _, _, part = _read(files.transformer, weights, ON_DEVICE)
    with files.transformer.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\0")
    os.utime(files.transformer, ns=(1, 1))
    reading = ReadingProgress((part,), LoadContext())
    with pytest.raises(WeightsInvalid, match="changed"):
        read_master(reading, part, weights, CPU, ON_DEVICE)


class _Pinning:
    """Page-locks as a machine without a GPU can: copies. Once it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.begun, self.may = threading.Event(), threading.Event()
        self.may.set()
        monkeypatch.setattr(shared, "pin", self)

    def __call__(self, tensors: Mapping[str, Tensor], _: torch.device) -> dict[str, Tensor]:
        self.count += 1
        self.begun.set()
        assert self.may.wait(WAIT_S)
        return {name: tensor.clone() for name, tensor in tensors.items()}


def test_all_gpus_have_one_page_locked_master(files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    pinning, weights, check = _Pinning(monkeypatch), WeightFiles(), _Check()
    pinning.may.clear()
    done: list[int] = []
    context = LoadContext(check, lambda progress: done.append(progress.total_bytes - progress.done_bytes))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_read, files.transformer, weights, ON_HOST)
        assert pinning.begun.wait(WAIT_S)
        other = pool.submit(_read, files.transformer, weights, ON_HOST, context)
        check.wait_for_looks(3)
        pinning.may.set()
        (first, revision, _), (second, again, _) = one.result(WAIT_S), other.result(WAIT_S)
    assert pinning.count == 1
    assert first.pieces is second.pieces
    assert revision == again
    assert done == [0]
    assert isinstance(first.pieces, HostWeights)
    held = weakref.ref(first.pieces)
    del first, second, one, other
    gc.collect()
    assert held() is None
    _read(files.transformer, weights, ON_HOST)
    assert pinning.count == 2


def test_a_device_that_waits_for_anothers_reading_can_be_stopped(files: CheckpointFiles) -> None:
    weights, meeting, check = WeightFiles(), _Meeting(), _Check()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_read, files.transformer, weights, None, meeting.context())
        assert meeting.begun.wait(WAIT_S)
        other = pool.submit(_read, files.transformer, weights, None, LoadContext(check=check))
        check.wait_for_looks(2)
        check.stops = True
        assert isinstance(other.exception(WAIT_S), JobCancelled)
        assert not one.done()
        meeting.may.set()
        assert one.result(WAIT_S)[1]


@pytest.mark.parametrize("plan", [None, ON_DEVICE], ids=["mapped", "on-device"])
def test_a_device_reads_the_file_where_the_one_before_it_was_stopped(
    files: CheckpointFiles, plan: MemoryPlan | None
) -> None:
    weights, meeting, check = WeightFiles(), _Meeting(), _Check()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_read, files.transformer, weights, plan, meeting.context(JobCancelled("")))
        assert meeting.begun.wait(WAIT_S)
        other: Future[Any] = pool.submit(_read, files.transformer, weights, plan, LoadContext(check=check))
        check.wait_for_looks(2)
        meeting.may.set()
        assert isinstance(one.exception(WAIT_S), JobCancelled)
        found, revision, _ = other.result(WAIT_S)
    expected = load_file(files.transformer)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name].dense(), tensor) for name, tensor in expected.items())
    assert revision == _read(files.transformer, WeightFiles(), None)[1]


def test_nobody_waits_for_a_device_that_gets_no_further(
    files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hang, and the others' watchdogs would take them to hang, too."""
    now: Callable[[], float] = iter(range(0, 10**9, 60)).__next__
    monkeypatch.setattr(shared.time, "monotonic", now)
    weights, meeting = WeightFiles(), _Meeting()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_read, files.transformer, weights, None, meeting.context())
        assert meeting.begun.wait(WAIT_S)
        _, revision, _ = pool.submit(_read, files.transformer, weights, None).result(WAIT_S)
        assert not one.done()
        meeting.may.set()
        assert one.result(WAIT_S)[1] == revision
