"""What the device may do to a job, and what the client and the server make of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chromarpc
from chromarpc_server.domain.errors import DeviceLost
from chromarpc_server.engine import worker
from chromarpc_server.pipeline import checkpoint, probe_device
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}


def _fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = checkpoint.denoise_from
    failed = threading.Event()

    def denoise_from(*arguments: Any, **keywords: Any) -> Any:
        for step in real(*arguments, **keywords):
            if not failed.is_set():
                failed.set()
                raise error
            yield step

    monkeypatch.setattr(checkpoint, "denoise_from", denoise_from)


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
