"""What stays in memory between requests, who is told of it, and who may run first because of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.v1 import model_service_pb2, model_service_pb2_grpc
from chromarpc_server.jobs.queue import MAX_OVERTAKEN
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

Serve = Callable[..., RunningServer]
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
FORMATS = ("aitk", "kohya", "loha")
ONE_SET = 1
"""A budget that no second set fits in."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FORMATS:
        shutil.copy(GOLDENS / "adapters" / f"{name}.safetensors", tmp_path)
    return tmp_path


def _lora(name: str, multiplier: float = 1.0) -> list[chromarpc.Lora]:
    return [chromarpc.Lora(f"{name}.safetensors", multiplier)]


def _listed(server: RunningServer) -> model_service_pb2.ListModelsResponse:
    with grpc.insecure_channel(server.target) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        return stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=10)


def _weights(client: chromarpc.Client, **options: Any) -> chromarpc.WeightsReport:
    (prepared,) = [
        event for event in client.generate("a", **SMALL, **options) if isinstance(event, chromarpc.Prepared)
    ]
    return prepared.weights


def _source(client: chromarpc.Client, **options: Any) -> str:
    return _weights(client, **options).source.value


def test_alternating_requests_switch_in_place_where_only_one_set_fits(serve: Serve, root: Path) -> None:
    server = serve(lora_root=root, prepared_bytes=ONE_SET)
    with chromarpc.Client(server.target) as client:
        assert _source(client, loras=_lora("aitk")) == "built"
        for name in ("kohya", "aitk", "kohya"):
            report = _weights(client, loras=_lora(name))
            assert report.source.value == "switched"
            assert report.resident_set_count == 1
            assert report.evicted_set_count == 1
            assert report.rewritten_tensor_count > 0
        assert _source(client, loras=_lora("kohya", 0.5)) == "switched"
        assert _source(client, loras=_lora("kohya", 0.5)) == "resident"
        assert _source(client) == "switched"
        assert _source(client, loras=_lora("loha", 0.0)) == "resident"
        cache = _listed(server).cache
        assert (cache.build_count, cache.switch_count, cache.hit_count, cache.eviction_count) == (1, 5, 2, 5)
        assert cache.adapter_bytes == sum((root / f"{name}.safetensors").stat().st_size for name in FORMATS)


def test_several_sets_stay_where_they_fit(serve: Serve, root: Path) -> None:
    server = serve(lora_root=root)
    with chromarpc.Client(server.target) as client:
        assert [_source(client, loras=_lora(name)) for name in FORMATS] == ["built"] * 3
        assert [_source(client, loras=_lora(name)) for name in FORMATS] == ["resident"] * 3
        models = {model.id: model for model in _listed(server).models}
        sets = models["chroma-mini"].resident_sets
        assert [len(held.adapters) for held in sets] == [1, 1, 1]
        assert models["chroma-mini"].resident_bytes > sum(held.size_bytes for held in sets) > 0


def test_a_switched_picture_is_the_cold_one(serve: Serve, root: Path) -> None:
    pictures = []
    for budget in (None, ONE_SET):
        server = serve(lora_root=root, prepared_bytes=budget)
        with chromarpc.Client(server.target) as client:
            if budget:
                client.generate_images("a", **SMALL, loras=_lora("loha"))
            pictures.append(client.generate_images("a", **SMALL, loras=_lora("kohya", 0.7))[0].data)
    assert pictures[0] == pictures[1]


def test_a_file_written_anew_is_read_anew(serve: Serve, root: Path) -> None:
    server = serve(lora_root=root)
    with chromarpc.Client(server.target) as client:
        first = client.generate_images("a", **SMALL, loras=_lora("aitk"))[0]
        shutil.copy(GOLDENS / "adapters" / "kohya.safetensors", root / "aitk.safetensors")
        second = client.generate_images("a", **SMALL, loras=_lora("aitk"))[0]
    assert first.data != second.data


def test_resident_jobs_go_first_but_keep_nobody_waiting_long(serve: Serve, root: Path) -> None:
    """Both halves: jobs of the resident set overtake, and no more than MAX_OVERTAKEN times."""
    server = serve(lora_root=root, prepared_bytes=ONE_SET)
    finished: list[str] = []

    async def go() -> None:
        async with chromarpc.AsyncClient(server.target) as client:
            running = client.generate("a", **LONG, loras=_lora("kohya"))
            async for event in running:
                if isinstance(event, chromarpc.Step):
                    break
            names = ["aitk", *["kohya"] * (MAX_OVERTAKEN + 2)]
            streams = []
            for index, name in enumerate(names):
                stream = client.generate("a", **SMALL, loras=_lora(name))
                async for event in stream:
                    if isinstance(event, chromarpc.Queued):
                        break
                streams.append((f"{name}-{index}", stream))

            async def follow(label: str, stream: Any) -> None:
                last = [event async for event in stream][-1]
                assert isinstance(last, chromarpc.Completed)
                finished.append(label)

            running.cancel()
            await asyncio.gather(*(follow(*pair) for pair in streams))

    asyncio.run(go())
    kohya = [f"kohya-{index}" for index in range(1, MAX_OVERTAKEN + 3)]
    assert finished == [*kohya[:MAX_OVERTAKEN], "aitk-0", *kohya[MAX_OVERTAKEN:]]
