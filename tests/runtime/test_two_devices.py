"""Two devices of one process at once: the same bits as one alone, and what befalls one is not the other's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import DeviceLost, OutOfMemory
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import DeviceChoice, choose_devices
from chromarpc_server.pipeline import device as pipeline_device
from chromarpc_server.pipeline import pipeline as pipeline_module
from chromarpc_server.pipeline.trainer.arithmetic import one_thread
from chromarpc_server.pipeline.weights import reading
from chromarpc_server.runtime import adapter_cache, worker
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.local_devices import LocalDevices
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Pixels, Work
from tests.device_threads import MODEL, Host, files_in, work_of
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

FAILS_PX = 128
"""Width of an image that fails where a test has it fail."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _choices() -> list[DeviceChoice]:
    choices = choose_devices(["cpu", "cpu"], "auto", threads=1)
    assert [choice.name for choice in choices] == ["cpu:0", "cpu:1"]
    return choices


async def _with_host(run: Callable[[Host], Awaitable[None]]) -> None:
    async with Host(_choices()) as host:
        await run(host)


def _adapter(name: str) -> Path:
    return GOLDENS / "adapters" / f"{name}.safetensors"


def _works(folder: Path) -> list[Work]:
    work = partial(work_of, folder)
    qint8 = TrainerSettings(qtype="qint8")
    return [
        work("preview-exact", _adapter("aitk"), trainer=TrainerSettings()),
        work("reference", _adapter("kohya_dora")),
        work("preview", _adapter("aitk_lokr_lowrank"), trainer=TrainerSettings(qtype="int8")),
        work("exact", _adapter("loha")),
        work("preview-exact", _adapter("mixed_rank_alpha"), trainer=qint8, multiplier=-1.0),
        work("fp8", _adapter("aitk")),
        work("preview", _adapter("mixed_rank_alpha"), trainer=TrainerSettings()),
        work("reference", _adapter("aitk"), multiplier=1.5),
    ]


def test_two_devices_that_draw_at_once_draw_what_one_alone_draws(tiny_checkpoint: Path) -> None:
    """Whatever the other one does meanwhile: each begins in another place of the list."""

    works = _works(tiny_checkpoint)

    async def alone() -> list[Pixels]:
        async with Host(_choices()) as host:
            return await host.draw(0, works)

    async def at_once() -> tuple[list[Pixels], list[Pixels]]:
        async with Host(_choices()) as host:
            first, second = await asyncio.gather(host.draw(0, works), host.draw(1, [*works[3:], *works[:3]]))
            return first, [*second[-3:], *second[:-3]]

    expected = asyncio.run(alone())
    assert len(expected) == 8
    assert len({image.tobytes() for image in expected}) == 8
    for images in asyncio.run(at_once()):
        assert [bool(np.array_equal(*pair)) for pair in zip(images, expected, strict=True)] == [True] * 8


def test_preloading_on_two_devices_opens_each_file_once_and_an_adapter_is_parsed_once(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    parsed: list[str] = []
    real_open, real_parse = reading.open_safetensors, adapter_cache.read_checked

    def open_counted(path: Path, *rest: Any) -> Any:
        opened.append(path.name)
        return real_open(path, *rest)

    def parse_counted(file: AdapterFile, *rest: Any, **keywords: Any) -> Any:
        parsed.append(file.path.name)
        return real_parse(file, *rest, **keywords)

    monkeypatch.setattr(reading, "open_safetensors", open_counted)
    monkeypatch.setattr(adapter_cache, "read_checked", parse_counted)

    async def run(host: Host) -> None:
        work = work_of(tiny_checkpoint, "reference", _adapter("aitk"))
        (file,) = work.adapter_files
        await asyncio.gather(
            *(device.load(MODEL, files_in(tiny_checkpoint), "reference") for device in host.devices)
        )
        assert sorted(opened) == [
            "chroma-mini.safetensors",
            "diffusion_pytorch_model.safetensors",
            "model.safetensors",
        ]
        assert [device.has_parsed(file) for device in host.devices] == [False, False]
        await asyncio.gather(host.draw(0, [work]), host.draw(1, [work]))
        assert [device.has_parsed(file) for device in host.devices] == [True, True]
        assert {device.snapshot.adapter_bytes for device in host.devices} == {file.size_bytes}

    asyncio.run(_with_host(run))
    assert parsed == ["aitk.safetensors"]


WORDS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
    "a library": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "the host": MemoryError(),
    "words that nobody knows": RuntimeError("workspace: could not get 1 GiB"),
}


@pytest.mark.parametrize("error", WORDS.values(), ids=WORDS)
def test_a_device_without_memory_fails_its_job_and_takes_nothing_of_the_other_one(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Even where its memory is so full that the probe finds no room, and whatever the error says."""
    real = pipeline_module.denoise_from

    def denoise_from(transformer: Any, embedding: Any, noise: Any, width: int, *rest: Any, **keywords: Any) -> Any:
        if width == FAILS_PX:
            monkeypatch.setattr(
                pipeline_device, "_failed_sum", lambda _: torch.OutOfMemoryError("CUDA out of memory.")
            )
            raise error
        yield from real(transformer, embedding, noise, width, *rest, **keywords)

    monkeypatch.setattr(pipeline_module, "denoise_from", denoise_from)

    async def run(host: Host) -> None:
        other, bad = (
            work_of(tiny_checkpoint, "reference", _adapter("aitk")),
            work_of(tiny_checkpoint, "reference", _adapter("loha"), size=(FAILS_PX, 64)),
        )
        (before,) = await host.draw(0, [other])
        with pytest.raises(OutOfMemory):
            await host.draw(1, [bad])
        await asyncio.sleep(0)
        assert (len(host.devices[0].snapshot.sets), host.devices[1].snapshot.sets) == (1, ())
        # Parsed adapters lie in the host's memory: they go where that is full.
        assert host.devices[0].has_parsed(other.adapter_files[0]) is not isinstance(error, MemoryError)
        again, second = await asyncio.gather(host.draw(0, [other]), host.draw(1, [other]))
        assert np.array_equal(before, again[0])
        assert np.array_equal(before, second[0])

    asyncio.run(_with_host(run))


def test_a_device_that_opens_while_another_computes_with_one_thread_has_its_own_number() -> None:
    torch.set_num_threads(2)
    device = DeviceThread(DeviceChoice(torch.device("cpu"), torch.float32), RunningTime())
    asked, done = threading.Event(), threading.Event()

    def compute() -> None:
        with one_thread():
            asked.set()
            assert done.wait(60)

    async def open_and_count() -> int:
        await device.open()
        return await asyncio.get_running_loop().run_in_executor(device._thread, torch.get_num_threads)

    with ThreadPoolExecutor(1) as other:
        computing = other.submit(compute)
        assert asked.wait(60)
        try:
            assert asyncio.run(open_and_count()) == 2
        finally:
            done.set()
        computing.result()
    device.close()


def test_a_device_that_is_lost_leaves_the_other_one_what_they_shared(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline_module.denoise_from

    def denoise_from(transformer: Any, embedding: Any, noise: Any, width: int, *rest: Any, **keywords: Any) -> Any:
        if width == FAILS_PX:
            raise RuntimeError("CUDA error: unspecified launch failure")
        yield from real(transformer, embedding, noise, width, *rest, **keywords)

    def lost(_: torch.device) -> bool:
        raise DeviceLost("the device failed and cannot be used any more")

    monkeypatch.setattr(pipeline_module, "denoise_from", denoise_from)
    monkeypatch.setattr(worker, "probe_device", lost)

    async def run(host: Host) -> None:
        other, bad = (
            work_of(tiny_checkpoint, "reference", _adapter("aitk")),
            work_of(tiny_checkpoint, "reference", _adapter("aitk"), size=(FAILS_PX, 64)),
        )
        (before,) = await host.draw(0, [other])
        with pytest.raises(DeviceLost):
            await host.draw(1, [bad])
        host.devices[1].close()
        (again,) = await host.draw(0, [other])
        assert np.array_equal(before, again)

    asyncio.run(_with_host(run))


def test_the_devices_of_a_host_share_one_of_everything_that_can_be_shared() -> None:
    devices = LocalDevices(_choices(), RunningTime())._devices
    assert len({id(device._share) for device in devices}) == 1
    for device in devices:
        device.close()
