"""What the device may do to a job, and what the client and the server make of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import chromarpc
from chromarpc_server.adapters import inspection as adapter_inspection
from chromarpc_server.adapters.weight_norms import WeightNorms
from chromarpc_server.app import App
from chromarpc_server.domain.errors import DeviceLost, OutOfMemory
from chromarpc_server.jobs import encoding
from chromarpc_server.pipeline import Checkpoint, CheckpointFiles, pipeline, probe_device
from chromarpc_server.runtime import device_thread, worker
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}


def _fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = pipeline.denoise_from
    failed = threading.Event()

    def denoise_from(*arguments: Any, **keywords: Any) -> Any:
        for step in real(*arguments, **keywords):
            if not failed.is_set():
                failed.set()
                raise error
            yield step

    monkeypatch.setattr(pipeline, "denoise_from", denoise_from)


def test_the_probe_finds_a_device_that_answers_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_device(torch.device("cpu"))
    monkeypatch.setattr(torch, "arange", lambda *_, **__: torch.zeros(256))
    with pytest.raises(DeviceLost):
        probe_device(torch.device("cpu"))


def test_out_of_memory_is_told_and_the_next_request_works(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_once(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    with chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.OutOfMemory) as caught:
            client.generate_images("a", **SMALL)
        assert caught.value.retry_after_s is None
        assert client.generate_images("a", **SMALL)


@pytest.mark.parametrize("at", ["preload", "opening"])
def test_a_device_too_full_to_start_is_told_in_a_sentence(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    if at == "preload":
        monkeypatch.setattr(Checkpoint, "load", full)
    else:
        monkeypatch.setattr(device_thread, "describe_device", full)
    settings = ServerSettings(
        port=0,
        device="cpu",
        model_folder={"chroma-mini": tiny_checkpoint},
        data_dir=tmp_path,
        preload=["chroma-mini"],
    )
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is, is asserted
        asyncio.run(App(settings).run())
    assert isinstance(raised.value, OutOfMemory)


def test_a_host_too_full_to_encode_a_picture_is_told_as_such(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    with chromarpc.Client(server.target) as client:
        monkeypatch.setattr(encoding, "encode_image", full)
        with pytest.raises(chromarpc.StatusError) as caught:
            client.generate_images("a", **SMALL)
        assert caught.value.reason == "OUT_OF_MEMORY"
        monkeypatch.undo()
        assert client.generate_images("a", **SMALL)


def test_an_inspection_that_runs_out_of_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(adapter_inspection, "open_transformer", full)
    files = CheckpointFiles(*(Path("unread") for _ in range(4)))
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is, is asserted
        adapter_inspection.inspect_adapter(Path("unread"), files, WeightNorms())
    assert isinstance(raised.value, OutOfMemory)


def test_the_unforeseen_has_an_id_and_tells_nothing_else(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fail_once(monkeypatch, KeyError("/secret/path"))
    with chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.ServerError) as caught:
            client.generate_images("a", **SMALL)
        error_id = caught.value.metadata["error_id"]
        assert "secret" not in f"{caught.value} {caught.value.metadata}"
        assert any(getattr(record, "error_id", "") == error_id for record in caplog.records)
        assert client.generate_images("a", **SMALL)


def test_a_lost_device_ends_the_process_with_70(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(_: torch.device) -> None:
        raise DeviceLost("the device failed and cannot be used any more")

    monkeypatch.setattr(worker, "probe_device", probe)
    _fail_once(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    server = serve()
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.DeviceLost):
        client.generate_images("a", **SMALL)
    server.thread.join(30)
    assert server.exit_code == [70]
