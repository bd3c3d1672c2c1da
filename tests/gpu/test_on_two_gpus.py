"""What only a second CUDA device can show. Run by hand where there are two: `pytest -m gpu tests/gpu`.

The current device is `cuda:0` throughout, as it is for a thread that selects none.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chromarpc
import chromarpc_server
from chromarpc_server.domain.errors import OutOfMemory
from chromarpc_server.domain.limits import Budgets, MemoryChoice
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import CheckpointFiles, DeviceChoice
from chromarpc_server.runtime.work import Pixels
from tests.device_threads import MODEL, Host, files_in, work_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, this machine has {torch.cuda.device_count()}"
    ),
]
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SIZE = 256
_FOLDER = Path(chromarpc_server.__file__).parent / "assets" / "chroma_mini"
FILES = CheckpointFiles(
    transformer=_FOLDER / "chroma-mini.safetensors",
    text_encoder=_FOLDER / "text_encoder_2",
    tokenizer=_FOLDER / "tokenizer_2",
    vae=_FOLDER / "vae",
)
REQUEST: dict[str, Any] = {"model": "chroma-mini", "width": SIZE, "height": SIZE, "sample_steps": 4, "seed": 7}


@pytest.fixture(autouse=True)
def _same_cards() -> None:
    names = [torch.cuda.get_device_name(device) for device in (FIRST, SECOND)]
    if names[0] != names[1]:
        pytest.skip(f"needs two alike, these are {names[0]} and {names[1]}")


def _draw(device: torch.device, profile: str, place: Any) -> dict[str, torch.Tensor]:
    """Two pictures, and a look at what was used for them; the second one runs recorded from its first step."""
    from chromarpc_server.pipeline import PROFILES, Checkpoint
    from chromarpc_server.pipeline.fused import plain
    from chromarpc_server.pipeline.fused.check import fused_ops

    checkpoint = Checkpoint.load(
        FILES, device=device, dtype=torch.bfloat16, memory=MemoryChoice(master=place, text_encoder=place)
    )
    pipeline = checkpoint.prepare((), PROFILES[profile])
    found = {}
    for number in range(2):
        embedding = pipeline.encode(pipeline.tokenize("a red circle"))
        *_, last = pipeline.denoise(
            embedding, width=SIZE, height=SIZE, steps=4, guidance_scale=4.0, seed=number, noise_draw="float32"
        )
        found[f"{number} embeds"] = embedding.embeds.cpu()
        found[f"{number} latents"] = last.latents.cpu()
        found[f"{number} pixels"] = torch.from_numpy(pipeline.decode(last.latents, SIZE, SIZE))
        pipeline.preview(last, SIZE, SIZE, 64)
    assert torch.cuda.current_device() == 0
    assert last.latents.device == device
    assert fused_ops(device) is not plain, f"{device} computes without kernels"
    if profile != "exact":
        assert pipeline.transformer.run.recorded_count == 1, f"{device} records no steps"
    if place == "device":
        assert pipeline.text_encoder._graph is not None, f"{device} does not record the text encoder"
    assert pipeline.fallbacks == ()
    return found


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("profile", ["reference", "fp8", "exact"])
def test_the_second_device_is_as_good_as_the_first(profile: str, place: str) -> None:
    """Kernels and graphs in use, and the same bits; also after the first device was used."""
    first, second = (_draw(device, profile, place) for device in (FIRST, SECOND))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture
def memory_of_the_first() -> int:
    """Bytes that are free before any server runs."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(FIRST)
    return free


@contextmanager
def server_on(folder: Path, *flags: str) -> Iterator[tuple[str, list[str]]]:
    """A server in a process of its own: its address and its log so far."""
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", "--store", "memory"]
    command += ["--data-dir", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        assert " listens on " in line, f"{line}{''.join(log)}"
        yield line.split(" listens on ")[1].split()[0], log
    finally:
        process.terminate()
        process.wait(60)
        reader.join(60)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def second_device_server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server on `cuda:1`."""
    with server_on(tmp_path, "--device", "cuda:1", "--preload", "chroma-mini") as running:
        yield running


def test_a_server_on_the_second_device_falls_back_on_nothing(second_device_server: tuple[str, list[str]]) -> None:
    with chromarpc.Client(second_device_server[0]) as client:
        pictures = []
        for _ in range(3):
            events = list(client.generate("a red circle", **REQUEST))
            prepared = next(event for event in events if isinstance(event, chromarpc.Prepared))
            assert [warning.code for warning in prepared.warnings] == []
            pictures.append(next(event for event in events if isinstance(event, chromarpc.ImageReady)).image.data)
        assert pictures[0] == pictures[1] == pictures[2]
        log = "".join(second_device_server[1])
        assert [word for word in ("unusable", "wrong", "unrecorded") if word in log] == [], log
        device = client.server_info().device
        assert device.id == "cuda:1"
        assert list(device.fallbacks) == []


def test_a_server_on_the_second_device_takes_nothing_of_the_first(
    memory_of_the_first: int, second_device_server: tuple[str, list[str]]
) -> None:
    """Not even a context, which takes a few hundred megabytes. Others on the card would be counted."""
    with chromarpc.Client(second_device_server[0]) as client:
        client.generate_images("a red circle", **REQUEST)
        free, _ = torch.cuda.mem_get_info(FIRST)
    assert memory_of_the_first - free < 100 * 2**20


def test_verify_uses_the_second_devices_kernels(goldens: Path) -> None:
    import io
    import json

    from chromarpc_server.pipeline.fused import plain
    from chromarpc_server.pipeline.fused.check import fused_ops
    from chromarpc_server.verify import verify

    found = []
    for device in ("cuda:0", "cuda:1"):
        out = io.StringIO()
        assert verify(goldens, device=device, as_json=True, out=out) == 0
        report = json.loads(out.getvalue())
        found.append([(case["case"], case["outcome"], case["rel"], case["max_abs"]) for case in report["cases"]])
    assert fused_ops(SECOND) is not plain
    assert found[0] == found[1]


GRAPHED = ("reference", "fp8", "preview")
"""Profiles whose steps are recorded."""


def _choices() -> list[DeviceChoice]:
    return [DeviceChoice(device, torch.bfloat16, str(device)) for device in (FIRST, SECOND)]


def _recorded(host: Host) -> list[list[int]]:
    """Graphs of each device's transformers, where they have any."""
    slots = [device._worker._cache._slots for device in host.devices]
    return [
        [slot.transformer.run.recorded_count for slot in some if slot.key.profile in GRAPHED] for some in slots
    ]


@pytest.mark.parametrize("place", ["device", "host"])
def test_two_device_threads_at_once_give_the_bits_of_one_alone(place: Any) -> None:
    """Whatever precision the other one asks for meanwhile: text in TF32, trainers' products in full or in TF32.

    They load at the same moment and record at the same time, and each begins in another place of the list.
    """
    budgets = Budgets(memory=MemoryChoice(master=place, text_encoder=place))
    size = (SIZE, SIZE)
    works = [
        work_of(_FOLDER, "exact", size=size),
        work_of(_FOLDER, "preview-exact", trainer=TrainerSettings(), size=size),
        work_of(_FOLDER, "reference", size=size, steps=4),
        work_of(_FOLDER, "preview", trainer=TrainerSettings(qtype="int8"), size=size, steps=4),
        work_of(_FOLDER, "preview-exact", trainer=TrainerSettings(qtype="int8"), size=size),
        work_of(_FOLDER, "fp8", size=size, steps=4),
        work_of(_FOLDER, "exact", size=size),
    ]

    async def alone() -> list[Pixels]:
        async with Host(_choices()[:1], budgets) as host:
            return await host.draw(0, works)

    async def at_once() -> tuple[list[Pixels], list[Pixels]]:
        async with Host(_choices(), budgets) as host:
            first, second = await asyncio.gather(host.draw(0, works), host.draw(1, [*works[3:], *works[:3]]))
            assert all(min(counts) > 0 for counts in _recorded(host)), "one of them records no steps"
            assert [device.snapshot.fallbacks for device in host.devices] == [(), ()]
            return first, [*second[-3:], *second[:-3]]

    expected = asyncio.run(alone())
    for images in asyncio.run(at_once()):
        assert [bool(np.array_equal(*pair)) for pair in zip(images, expected, strict=True)] == [True] * len(works)
    setting = torch.backends.cuda.matmul.fp32_precision
    assert setting != "tf32", "the precision of float32 products was left switched"


def test_both_devices_record_at_the_same_time_and_load_one_host_master(monkeypatch: pytest.MonkeyPatch) -> None:
    from chromarpc_server.pipeline.models import text_encoder
    from chromarpc_server.pipeline.weights import shared

    locked: list[int] = []
    real = shared.pin

    def pin(tensors: Any, device: torch.device) -> Any:
        locked.append(sum(tensor.nbytes for tensor in tensors.values()))
        return real(tensors, device)

    monkeypatch.setattr(shared, "pin", pin)
    monkeypatch.setattr(text_encoder, "pin", pin)

    async def run() -> None:
        budgets = Budgets(memory=MemoryChoice(master="host", text_encoder="host"))
        async with Host(_choices(), budgets) as host:
            loads = (device.load(MODEL, files_in(_FOLDER), "reference", [(SIZE, SIZE)]) for device in host.devices)
            await asyncio.gather(*loads)
            assert all(min(counts) > 0 for counts in _recorded(host)), "one of them records no steps"
            assert [device.snapshot.fallbacks for device in host.devices] == [(), ()]
            held = [device._worker._cache._checkpoints[MODEL] for device in host.devices]
            assert held[0].master.pieces is held[1].master.pieces
            assert all(tensor.is_pinned() for tensor in held[0].master.pieces.values())
            assert held[0].revision == held[1].revision
            # The master and the text encoder's layers, each once for both devices.
            assert len(locked) == 2
            assert locked[0] == sum(tensor.nbytes for tensor in held[0].master.values())

    asyncio.run(run())


def test_a_device_that_runs_out_of_memory_takes_nothing_of_the_other_one() -> None:
    """The other one draws meanwhile; afterwards both do."""
    work = work_of(_FOLDER, "reference", size=(SIZE, SIZE), steps=4)
    large = work_of(_FOLDER, "reference", size=(2048, 2048), steps=1)

    async def run() -> None:
        async with Host(_choices()) as host:
            (before,) = await host.draw(0, [work])
            await host.draw(1, [work])
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(SECOND)
            taken = [torch.empty(free - 64 * 2**20, dtype=torch.uint8, device=SECOND)]
            failed, drawn = await asyncio.gather(
                host.draw(1, [large]), host.draw(0, [work] * 3), return_exceptions=True
            )
            assert isinstance(failed, OutOfMemory)
            assert isinstance(drawn, list)
            taken.clear()
            torch.cuda.empty_cache()
            again, second = await asyncio.gather(host.draw(0, [work]), host.draw(1, [work]))
            assert [bool(np.array_equal(before, image)) for image in (*drawn, *again, *second)] == [True] * 5

    asyncio.run(run())
