"""A server whose transformer lies in any of the formats, draws with adapters and says what it is stored as."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import chromarpc
from tests.conftest import RunningServer
from tests.pipeline.formats import writers
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

NAME = "chroma-mini.safetensors"


@pytest.mark.parametrize("name", writers.FORMATS)
def test_a_server_draws_with_an_adapter_from_every_format(
    name: str, serve: Callable[..., RunningServer], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, write = writers.FORMATS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns(NAME))
    with safe_open(tiny_checkpoint / NAME, "pt") as file:
        config = file.metadata()["config"]
    write(load_file(tiny_checkpoint / NAME), config, folder / NAME)
    server = serve(model_folder={"chroma-mini": folder}, lora_root=GOLDENS / "adapters", preload=["chroma-mini"])
    small = {"model": "chroma-mini", "width": 32, "height": 32, "sample_steps": 2}
    with chromarpc.Client(server.target) as client:
        (plain,) = client.generate_images("a", **small)
        (adapted,) = client.generate_images("a", loras=["aitk.safetensors"], **small)
        (again,) = client.generate_images("a", **small)
        assert next(model for model in client.list_models().models if model.id == "chroma-mini").resident
    assert plain.sha256 == again.sha256 != adapted.sha256


def test_a_damaged_transformer_stops_the_start_by_its_name(
    serve: Callable[..., RunningServer], tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    raw = (GOLDENS / "formats_hashed" / "q8_0.gguf").read_bytes()
    (folder / NAME).write_bytes(raw[: len(raw) // 2])
    server = serve(model_folder={"chroma-mini": folder}, preload=["chroma-mini"])
    server.thread.join(60)
    assert server.exit_code[0]
    assert "truncated: its tensors claim" in caplog.text
