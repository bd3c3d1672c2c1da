"""A device on another machine does what a thread here does, as far as the engine sees."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.cluster import outgoing_files
from chromarpc_server.cluster.messages import Opened, Resident
from chromarpc_server.cluster.ray_device import HostFailed, OtherWeights, RayDevice
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import (
    DeviceHung,
    DeviceLost,
    JobCancelled,
    JobDeadlineExceeded,
    LoraChanged,
    LoraDamaged,
    WeightsMissing,
)
from chromarpc_server.domain.events import Prepared, Preview, Step
from chromarpc_server.domain.models import LocalPart, ModelSpec
from chromarpc_server.jobs.encoding import encode_image, encode_preview
from chromarpc_server.jobs.picture_record import picture_record
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.device import DeviceWithdrawn
from chromarpc_server.runtime.work import EncodedImage, RenderedImage, RenderedPreview, Report
from tests.cluster.relay import relay
from tests.cluster.stand import MODEL, model_files, plan, run, stand, thread, work
from tests.tiny_checkpoint import GOLDENS


def _adapter(tmp_path: Path, name: str = "aitk") -> AdapterFile:
    path = tmp_path / f"{name}.safetensors"
    shutil.copyfile(GOLDENS / "adapters" / f"{name}.safetensors", path)
    return AdapterFile.of(path, "path")


async def test_the_events_and_the_file_are_those_of_a_thread(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, what = _adapter(tmp_path), plan("aitk.safetensors")
    here = await thread()
    _, expected = await run(here, work(tiny_checkpoint, what, (file,)))
    here.close()
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        description = await device.open()
        done, reports = await run(device, work(tiny_checkpoint, what, (file,)))
        assert device.snapshot.holds(work(tiny_checkpoint, what, (file,)).set_key)
        device.close()

    assert isinstance(description, DeviceDescription)
    assert description.name == here.description.name
    assert description.id == "ray:1"
    assert description.host
    assert done.timings.denoising_s > 0
    prepared = next(one for one in reports if isinstance(one, Prepared))
    before = next(one for one in expected if isinstance(one, Prepared))
    assert prepared.adapters == before.adapters
    assert prepared.versions == before.versions
    assert [one.sigma for one in reports if isinstance(one, Step)] == [
        one.sigma for one in expected if isinstance(one, Step)
    ]
    image = next(one for one in reports if isinstance(one, EncodedImage))
    pixels = next(one for one in expected if isinstance(one, RenderedImage))
    record = picture_record(what, 0, before, device_dtype="float32")
    assert (image.header, image.data) == encode_image(pixels, what.output, record)
    previews = [one for one in reports if isinstance(one, Preview)]
    assert previews == [encode_preview(one) for one in expected if isinstance(one, RenderedPreview)]


async def test_an_adapter_is_sent_to_a_host_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, what = _adapter(tmp_path), plan("aitk.safetensors", preview=None)
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        devices = [await set_up.device(), await set_up.device()]
        for device in devices:
            await device.open()
        await asyncio.gather(*(run(device, work(tiny_checkpoint, what, (file,))) for device in devices))
        kept = sorted((tmp_path / "content").glob("*.safetensors"))
        assert [one.stem for one in kept] == [hashlib.sha256(file.path.read_bytes()).hexdigest()]
        for device in devices:
            device.close()


async def test_an_adapter_whose_sending_was_stopped_is_sent_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing_files, "PIECE_BYTES", 64)
    file, what = _adapter(tmp_path), plan("aitk.safetensors", preview=None)
    folder, cancellation = tmp_path / "content", Cancellation()
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        stopped = asyncio.create_task(run(device, work(tiny_checkpoint, what, (file,), cancellation)))
        async with asyncio.timeout(30):
            while not list(folder.glob("*.part")):  # noqa: ASYNC110 - another process would look so too
                await asyncio.sleep(0.001)
        cancellation.cancel(JobCancelled("by the caller"))
        with pytest.raises(JobCancelled):
            await stopped
        await run(device, work(tiny_checkpoint, what, (file,)))
        device.close()


async def test_an_actor_that_says_what_makes_no_sense_is_lost(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        token = set_up.port.expect("odd")
        link = await set_up.connect()
        link.greet({"actor": "odd", "token": token, "host": "odd", "pid": 1, "versions": {}})
        _, said, ours = await set_up.arrived.get()
        device = RayDevice(
            "ray:1", said.host, ours, set_up.files, set_up.revisions, set_up.running_time, set_up.settings
        )
        link.send(Opened(DeviceDescription("ray:1", "GPU", 1, "float32", ("reference",))))
        await device.open()
        link.send(Resident(5))  # type: ignore[arg-type]
        assert "cannot be understood" in (await asyncio.wait_for(device.lost(), 5)).message
        link.abort()


async def test_a_hosts_damaged_copy_is_fetched_anew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, what = _adapter(tmp_path), plan("aitk.safetensors", preview=None)
    folder = tmp_path / "content"
    folder.mkdir()
    copy = folder / f"{hashlib.sha256(file.path.read_bytes()).hexdigest()}.safetensors"
    copy.write_bytes(bytes(file.size_bytes))
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        await run(device, work(tiny_checkpoint, what, (file,)))
        device.close()
    assert copy.read_bytes() == file.path.read_bytes()


async def test_a_cancel_reaches_the_host_within_a_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cancellation, steps = Cancellation(), 0

    def take(report: Report) -> None:
        nonlocal steps
        steps += isinstance(report, Step)
        if steps == 2:
            cancellation.cancel(JobCancelled("by the caller"))

    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        with pytest.raises(JobCancelled, match="by the caller"):
            await device.run(work(tiny_checkpoint, plan(steps=500), (), cancellation), take)
        assert steps < 50
        # It goes on serving.
        await run(device, work(tiny_checkpoint, plan(steps=2)))
        device.close()


async def test_a_deadline_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        await device.load(MODEL, model_files(tiny_checkpoint), "reference")
        deadline_at = asyncio.get_running_loop().time() + 0.3
        with pytest.raises(JobDeadlineExceeded):
            await run(device, work(tiny_checkpoint, plan(steps=2000), (), Cancellation(deadline_at)))
        device.close()


async def test_a_host_without_the_weights_says_so_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        folder = tmp_path / "empty"
        folder.mkdir()
        device = await set_up.device(settings=replace(set_up.settings, model_folders=((MODEL, folder),)))
        with pytest.raises(WeightsMissing, match="on the host"):
            await device.open()


async def test_a_job_whose_connection_ends_is_told_so_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()

        def take(report: Report) -> None:
            if isinstance(report, Step):
                set_up.hosts[0].cancel()

        with pytest.raises(DeviceLost, match="connection to the actor"):
            await device.run(work(tiny_checkpoint, plan(steps=500)), take)
        assert isinstance(await device.lost(), DeviceLost)


async def test_a_host_that_a_network_hides_is_given_up_and_what_it_goes_on_to_say_is_ignored(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    async with stand(tiny_checkpoint, tmp_path, step_s=1.0) as set_up, relay(set_up.port.port) as network:
        device, other = await set_up.device(through=network.port), await set_up.device()
        await device.open()
        await other.open()
        loop = asyncio.get_running_loop()
        reports: list[Report] = []

        def take(report: Report) -> None:
            reports.append(report)
            if isinstance(report, Step):
                network.is_open.clear()

        began = loop.time()
        with pytest.raises(DeviceHung, match="has said nothing"):
            await device.run(work(tiny_checkpoint, plan(steps=50)), take)
        assert loop.time() - began < 10
        heard = len(reports)
        network.is_open.set()
        done, again = await run(other, work(tiny_checkpoint, plan(steps=50)))
        assert done.timings.denoising_s > 0
        await asyncio.wait({set_up.hosts[0]}, timeout=10)  # the old one ends, as its connection has
        assert set_up.hosts[0].done()
        assert len(reports) == heard
        assert sum(isinstance(one, EncodedImage) for one in again) == 1
        with pytest.raises(DeviceHung):
            await run(device, work(tiny_checkpoint, plan()))
        other.close()


async def test_a_host_with_other_weights_is_lost_before_it_draws(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        set_up.revisions.difference({MODEL: "0" * 64})
        device = await set_up.device()
        await device.open()
        reports: list[Report] = []
        with pytest.raises(DeviceLost, match="instead of 000000000000"):
            await device.run(work(tiny_checkpoint, plan()), reports.append)
        assert not any(isinstance(one, Step) for one in reports)


async def test_a_host_whose_parts_differ_is_not_opened(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    tokenizer = other / "tokenizer_2" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        await (await set_up.device()).open()
        await (await set_up.device()).open()
        device = await set_up.device(settings=replace(set_up.settings, model_folders=((MODEL, other),)))
        with pytest.raises(OtherWeights, match=f"of the tokenizer of {MODEL} instead of"):
            await device.open()


async def test_a_host_draws_with_a_model_of_the_servers_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = {
        "transformer": tiny_checkpoint / "chroma-mini.safetensors",
        "text_encoder": tiny_checkpoint / "text_encoder_2",
        "tokenizer": tiny_checkpoint / "tokenizer_2",
        "autoencoder": tiny_checkpoint / "vae",
    }
    spec = ModelSpec("mine", "", **{name: LocalPart(path) for name, path in parts.items()}, base_name="me/mine")
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        settings = replace(set_up.settings, models=(spec,), served_models=("mine",), model_folders=())
        device = await set_up.device(settings=settings)
        await device.open()
        _, reports = await run(device, work(tiny_checkpoint, plan(model="mine", served_model="mine")))
        assert list(device.snapshot.revisions) == ["mine"]
        assert any(isinstance(report, EncodedImage) for report in reports)


async def test_a_device_that_is_given_back_finishes_what_it_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()

        def take(report: Report) -> None:
            if isinstance(report, Step):
                device.retire(DeviceWithdrawn("not needed"))

        assert await device.run(work(tiny_checkpoint, plan()), take)
        assert isinstance(await device.lost(), DeviceWithdrawn)


async def test_an_exception_that_nobody_foresaw_comes_with_its_traceback(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        bad = plan(served_model="no-such-model")
        with pytest.raises(HostFailed, match="KeyError"):
            await run(device, work(tiny_checkpoint, bad))
        await run(device, work(tiny_checkpoint, plan()))  # it goes on serving
        device.close()


async def test_a_file_that_is_written_anew_while_it_is_sent_is_not_taken(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file, what = _adapter(tmp_path), plan("aitk.safetensors", preview=None)
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        await set_up.files.named([file])
        shutil.copyfile(GOLDENS / "adapters" / "kohya.safetensors", file.path)
        with pytest.raises(LoraChanged):
            await run(device, work(tiny_checkpoint, what, (file,)))
        assert not list((tmp_path / "content").glob("*.safetensors"))
        device.close()


async def test_an_upload_that_is_damaged_on_the_servers_disk_is_told_so(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = _adapter(tmp_path)
    sha256 = hashlib.sha256(found.path.read_bytes()).hexdigest()
    found.path.write_bytes(bytes(found.size_bytes))
    named = AdapterFile.of(found.path, "path", sha256=sha256)
    async with stand(tiny_checkpoint, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        with pytest.raises(LoraDamaged):
            await run(device, work(tiny_checkpoint, plan(f"sha256:{sha256}", preview=None), (named,)))
        assert not list((tmp_path / "content").glob("*.safetensors"))
        device.close()
