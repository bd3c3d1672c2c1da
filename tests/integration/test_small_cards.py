"""A real server whose device has too little memory for the whole transformer: what it draws, refuses and tells."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import chromarpc
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline.opening import OpenCheckpoint
from tests.conftest import RunningServer
from tests.integration.test_device_errors import _fail_once

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
PLAN = MemoryPlan(
    "float8",
    text_encoder="host",
    master="mapped",
    tile_autoencoder=False,
    record_graphs=False,
    estimated_bytes=7,
    usable_bytes=8,
    streamed_blocks=3,
    host_bytes=9,
    host_available_bytes=10,
)


def _pixels(image: chromarpc.GeneratedImage) -> bytes:
    return Image.open(io.BytesIO(image.data)).tobytes()


def test_a_device_that_streams_blocks_draws_the_same_image_and_refuses_what_needs_them_all(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chromarpc.Client(serve(preload=["chroma-mini"]).target) as client:
        whole = client.generate_images("a", **SMALL)
    monkeypatch.setattr(OpenCheckpoint, "plan", lambda *_: PLAN)
    server = serve(preload=["chroma-mini"])
    with chromarpc.Client(server.target) as client:
        for profile in ("exact", "preview"):
            with pytest.raises(chromarpc.InvalidRequest, match=f"{profile} needs the whole transformer"):
                client.create_job("a", profile=profile, **SMALL)
        streamed = client.generate_images("a", **SMALL)
        (model,) = (one for one in client.list_models() if one.id == "chroma-mini")
    assert _pixels(streamed[0]) == _pixels(whole[0])
    plan = model.memory_plan
    assert (plan.master, plan.streamed_blocks) == ("mapped", 3)
    assert (plan.host_bytes, plan.host_available_bytes) == (9, 10)
    told = {one.id: one.unavailable_because for one in model.profiles}
    assert {name for name, why in told.items() if not why} == {"reference", "fp8"}
    assert "3 of its blocks are streamed" in told["preview-exact"]


def test_out_of_memory_names_the_size_of_the_largest_image(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    with chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.OutOfMemory, match=r"largest image is 96×64; .* images up to 1024×1024"):
            client.generate_images("a", **{**SMALL, "width": 96})
        assert client.generate_images("a", **SMALL)
