"""A server whose transformer lies in any of the formats, draws with adapters and says what it is stored as."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import chromarpc
from chromarpc_server.app import App
from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer
from tests.pipeline.formats import writers
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

NAME = "chroma-mini.safetensors"


@pytest.mark.parametrize("name", writers.FORMATS)
def test_a_server_draws_with_an_adapter_from_every_format(
    name: str, serve: Callable[..., RunningServer], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stored_as, write = writers.FORMATS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns(NAME))
    with safe_open(tiny_checkpoint / NAME, "pt") as file:
        config = file.metadata()["config"]
    write(load_file(tiny_checkpoint / NAME), config, folder / NAME)
    server = serve(model_folder={"chroma-mini": folder}, lora_root=GOLDENS / "adapters", preload=["chroma-mini"])
    small = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
    with chromarpc.Client(server.target) as client:
        events = list(client.generate("a", **small))
        (plain,) = client.generate_images("a", **small)
        (adapted,) = client.generate_images("a", loras=["aitk.safetensors"], **small)
        (again,) = client.generate_images("a", **small)
        (model,) = [each for each in client.list_models() if each.id == "chroma-mini"]
    assert plain.sha256 == again.sha256 != adapted.sha256
    assert {part.part: part.stored_as for part in model.parts}["transformer"] == stored_as
    assert [event.stored_as for event in events if isinstance(event, chromarpc.Prepared)] == [stored_as]


def test_a_damaged_transformer_stops_the_start_by_its_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    raw = (GOLDENS / "formats_hashed" / "q8_0.gguf").read_bytes()
    (folder / NAME).write_bytes(raw[: len(raw) // 2])
    settings = ServerSettings(
        port=0, device="cpu", model_folder={"chroma-mini": folder}, data_dir=tmp_path, preload=["chroma-mini"]
    )
    with pytest.raises(WeightsInvalid, match=r"chroma-mini\.safetensors: truncated: its tensors claim"):
        asyncio.run(App(settings).run())
