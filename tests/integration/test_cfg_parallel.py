"""A server whose devices work in pairs, here a CPU twice: `--devices cpu,cpu --cfg-parallel`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import chromarpc
from tests.conftest import RunningServer, start_server
from tests.tiny_checkpoint import GOLDENS

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 3, "seed": 3}


@pytest.fixture(scope="module")
def pair(
    tiny_checkpoint: Path, lora_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    running = start_server(
        model_folder={"chroma-mini": tiny_checkpoint},
        lora_root=lora_root,
        data_dir=tmp_path_factory.mktemp("data"),
        grace_s=0,
        devices="cpu,cpu",
        cfg_parallel=True,
        threads=2,
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def adapter(lora_root: Path) -> str:
    save_file(load_file(GOLDENS / "adapters" / "aitk.safetensors"), lora_root / "of-a-pair.safetensors")
    return "of-a-pair.safetensors"


def _image(server: RunningServer, **request: Any) -> chromarpc.GeneratedImage:
    with chromarpc.Client(server.target) as client:
        return client.generate_images("a", **SMALL | request)[0]


@pytest.mark.parametrize("profile", ["exact", "preview-exact"])
def test_a_pair_draws_what_one_device_draws(
    profile: str, server: RunningServer, pair: RunningServer, adapter: str
) -> None:
    request: dict[str, Any] = {
        "profile": profile,
        "picture_record": False,
        "loras": [chromarpc.Lora(adapter, 0.5)],
    }
    one, two = (_image(where, **request) for where in (server, pair))
    assert one.prepared is not None
    assert two.prepared is not None
    assert (one.prepared.device_id, one.prepared.second_device) == ("cpu", "")
    assert (two.prepared.device_id, two.prepared.second_device) == ("cpu:0+cpu:1", "cpu")
    assert two.sha256 == one.sha256


def test_a_pair_is_one_device_and_says_so_in_the_picture(pair: RunningServer) -> None:
    with chromarpc.Client(pair.target) as client:
        devices = client.server_info().devices
        assert [(device.id, device.second) for device in devices] == [("cpu:0+cpu:1", "cpu")]
    said = {}
    for guidance in (4.0, 1.0):
        image = _image(pair, guidance_scale=guidance)
        record = json.loads(Image.open(io.BytesIO(image.data)).info["chromarpc"])
        said[guidance] = record.get("guidance_on_two_devices")
    assert said == {4.0: True, 1.0: None}


def test_previews_steps_and_cancels_work_as_with_one(pair: RunningServer) -> None:
    with chromarpc.Client(pair.target) as client:
        events = list(client.generate("a", preview_every=1, **SMALL))
        assert [event.step for event in events if isinstance(event, chromarpc.Step)] == [1, 2, 3]
        assert [event.step for event in events if isinstance(event, chromarpc.Preview)][:2] == [1, 2]
        long = client.create_job("a", **SMALL | {"sample_steps": 150}).job_id
        watched = client.watch_job(long)
        assert any(isinstance(event, chromarpc.Step) for event in watched)
        client.cancel_job(long)
        with pytest.raises(chromarpc.Cancelled):
            list(watched)
        assert _image(pair, picture_record=False).sha256 == _image(pair, picture_record=False).sha256
