"""Pictures of a real server carry their record, whoever fetches them, and only where they may."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import chromarpc
from chromarpc import Lora
from chromarpc.events import ImageFormat
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

Serve = Callable[..., RunningServer]
RECORDED = GOLDENS / "adapters" / "aitk.safetensors"
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1.0,
}


def _record(data: bytes) -> dict[str, Any] | None:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()  # what the client adds comes last
        text = picture.info.get("chromarpc")
        return None if text is None else json.loads(text)


def _pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.tobytes()


def _on_disk(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    shutil.copy(RECORDED, folder / "a.safetensors")
    return folder


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_everybody_is_handed_the_same_bytes(server: RunningServer, image_format: ImageFormat) -> None:
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a planted prompt", output_format=image_format, **SMALL)
        (ready,) = (event for event in client.watch_job(job.job_id) if isinstance(event, chromarpc.ImageReady))
        (again,) = client.generate_images("a planted prompt", output_format=image_format, **SMALL)
        data = client.get_image_bytes(job.job_id)
        stored = client.get_job(job.job_id).images[0]
        (later,) = (event for event in client.watch_job(job.job_id) if isinstance(event, chromarpc.ImageReady))
    assert data == ready.image.data == later.image.data == again.data == ready.image.file_bytes()
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert b"a planted prompt" in data


def test_a_record_tells_the_adapters_content_and_what_the_job_said(serve: Serve, root: Path) -> None:
    server = serve(lora_root=root, alias={"chroma": "chroma-mini"})
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images("a", loras=Lora("a.safetensors", 0.5), **{**SMALL, "model": "chroma"})
    record = _record(image.data)
    assert record is not None
    assert image.prepared is not None
    assert record["adapters"][0]["sha256"] == hashlib.sha256(RECORDED.read_bytes()).hexdigest()
    assert record["model_revision"] == image.prepared.model_revision
    assert (record["model"], record["served_model"]) == ("chroma", "chroma-mini")
    assert (record["device"], record["dtype"]) == (image.prepared.device, "float32")
    assert record["versions"] == dict(image.prepared.versions)
    assert record["request"]["loras"] == [{"path": "a.safetensors", "network_multiplier": 0.5}]
    assert image.plan.job_id not in image.data.decode("latin-1")
    assert str(root) not in image.data.decode("latin-1")


@pytest.mark.parametrize("settings", [None, "comfyui"])
def test_the_recorded_request_gives_the_same_file_whatever_it_was_sampled_with(
    server: RunningServer, settings: str | None
) -> None:
    said: dict[str, Any] = {"sampler": "heun", "schedule": "beta", "shift": 1.5, "neg": "blue", "use_neg": True}
    drawn = {**SMALL, "guidance_scale": 3.0, **said}
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images("a (red:1.2) circle", settings=settings, **drawn)
        record = _record(image.data)
        assert record is not None
        body = chromarpc.parse_request_json(json.dumps(record["request"]))
        (again,) = (
            event.image
            for event in client.generate_request(body.request)
            if isinstance(event, chromarpc.ImageReady)
        )
    assert body.unknown == ()
    assert image.warnings == ()
    assert again.data == image.data
    assert record["stored_as"] == "bf16"


def test_the_recorded_request_gives_the_same_file_on_another_server(serve: Serve, root: Path) -> None:
    one, other = serve(lora_root=root), serve(lora_root=root)
    with chromarpc.Client(one.target) as client, chromarpc.Client(other.target) as another:
        _, second = client.generate_images(["x", "a\ncät"], loras=Lora("a.safetensors", 0.5), **SMALL)
        record = _record(second.data)
        assert record is not None
        body = chromarpc.parse_request_json(json.dumps(record["request"])).request
        with another.generate_request(body) as stream:
            (ready,) = (event for event in stream if isinstance(event, chromarpc.ImageReady))
    assert ready.image.data == second.data


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "jpeg-trainer"])
def test_a_record_can_be_left_out_and_the_pixels_are_the_same(
    serve: Serve, server: RunningServer, image_format: ImageFormat
) -> None:
    off = serve(picture_record=False)
    with chromarpc.Client(server.target) as client, chromarpc.Client(off.target) as without:
        (default,) = client.generate_images("a", output_format=image_format, **SMALL)
        (asked,) = client.generate_images("a", output_format=image_format, picture_record=True, **SMALL)
        (left_out,) = client.generate_images("a", output_format=image_format, picture_record=False, **SMALL)
        (turned_off,) = without.generate_images("a", output_format=image_format, **SMALL)
        (in_vain,) = without.generate_images("a", output_format=image_format, picture_record=True, **SMALL)
    assert asked.data != left_out.data
    assert default.data == (left_out if image_format == "jpeg-trainer" else asked).data
    assert turned_off.data == in_vain.data == left_out.data == left_out.file_bytes()
    assert _pixels(asked.data) == _pixels(left_out.data)
    assert [warning.code for warning in in_vain.warnings] == ["PICTURE_RECORD_LEFT_OUT"]
    assert turned_off.warnings == left_out.warnings == ()
    assert not turned_off.plan.picture_record


def test_where_no_prompt_is_stored_none_is_in_a_picture_and_the_job_says_so(serve: Serve, tmp_path: Path) -> None:
    server = serve(store_prompts=False)
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a planted secret", output_format="jpeg", **SMALL)
        (ready,) = (event for event in client.watch_job(job.job_id) if isinstance(event, chromarpc.ImageReady))
        assert [warning.code for warning in ready.image.warnings] == ["PICTURE_RECORD_LEFT_OUT"]
        assert client.get_image_bytes(job.job_id) == ready.image.data
    server.stop()
    kept = _on_disk(tmp_path / "data")
    assert any(ready.image.data == data for data in kept)
    assert not any(b"planted" in data for data in kept)


def test_a_store_in_memory_takes_no_prompt_to_the_disk_and_writes_records(serve: Serve, tmp_path: Path) -> None:
    server = serve(store_prompts=False, store="memory")
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images("a planted secret", **SMALL)
    assert b"planted" in image.data
    assert not any(b"planted" in data for data in _on_disk(tmp_path / "data"))


def test_a_job_that_waited_for_a_stricter_server_has_no_record(serve: Serve) -> None:
    server = serve()
    with chromarpc.Client(server.target) as client:
        client.create_job("long", **{**SMALL, "sample_steps": 150, "width": 256, "height": 256})
        waiting = client.create_job("a planted secret", **SMALL)
    server.stop()
    server = serve(picture_record=False)
    with chromarpc.Client(server.target) as client:
        for job in client.list_jobs():
            if job.job_id != waiting.job_id:
                client.cancel_job(job.job_id)
        events = list(client.watch_job(waiting.job_id))
        (ready,) = (event for event in events if isinstance(event, chromarpc.ImageReady))
    assert _record(ready.image.data) is None
    assert not ready.image.plan.picture_record


def test_an_older_servers_png_gets_its_record_from_the_client(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images("a", picture_record=False, **SMALL)
    older = replace(image, plan=replace(image.plan, picture_record=True))
    record = _record(older.file_bytes())
    assert record is not None
    assert record["job_id"] == image.plan.job_id
