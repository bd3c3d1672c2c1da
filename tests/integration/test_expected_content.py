"""Requests that pin an adapter's content, through the real client and a real server."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc import Client, Lora, LoraContentChanged
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

RECORDED = GOLDENS / "adapters" / "aitk.safetensors"
SHA256 = hashlib.sha256(RECORDED.read_bytes()).hexdigest()
OTHER = "ab" * 32
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1.0,
}


@pytest.fixture
def client(serve: Callable[..., RunningServer], tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "root").mkdir()
    shutil.copy(RECORDED, tmp_path / "root" / "a.safetensors")
    with Client(serve(lora_root=tmp_path / "root").target, timeout_s=60) as client:
        yield client


def _require_refusal(error: LoraContentChanged) -> None:
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LORA_CONTENT_CHANGED")
    assert [violation.field for violation in error.violations] == ["loras.0.expected_sha256"]
    assert error.metadata["sha256_now"] == SHA256


def test_a_job_fails_before_it_draws_where_the_file_turns_out_to_be_another(client: Client) -> None:
    seen: list[str] = []
    events = client.generate("a", loras=Lora("a.safetensors", 0.5, OTHER), **SMALL)
    with pytest.raises(LoraContentChanged) as caught:
        seen.extend(type(event).__name__ for event in events)
    _require_refusal(caught.value)
    assert seen[0] == "Accepted"
    assert not {"Prepared", "Step", "ImageReady"} & set(seen)


def test_no_job_is_made_where_the_hash_is_known(client: Client) -> None:
    client.inspect_lora("a.safetensors", model="chroma-mini")
    for path in ("a.safetensors", f"sha256:{SHA256}"):
        with pytest.raises(LoraContentChanged) as caught:
            client.create_job("a", loras=Lora(path, expected_sha256=OTHER), **SMALL)
        _require_refusal(caught.value)
    assert list(client.list_jobs()) == []


def test_the_content_that_is_expected_is_drawn_and_told(client: Client) -> None:
    (image,) = client.generate_images("a", loras=Lora("a.safetensors", 0.5, SHA256.upper()), **SMALL)
    assert image.plan.loras == (
        chromarpc.PlannedLora(path="a.safetensors", network_multiplier=0.5, expected_sha256=SHA256),
    )
    assert image.prepared is not None
    assert image.prepared.adapters[0].placement is chromarpc.AdapterPlacement.MERGED
