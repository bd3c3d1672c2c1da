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


def _model_id(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "-").replace("_", "-")


def test_a_server_draws_with_an_adapter_from_every_format(
    serve: Callable[..., RunningServer], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with safe_open(tiny_checkpoint / NAME, "pt") as file:
        config = file.metadata()["config"]
    weights = load_file(tiny_checkpoint / NAME)
    others = {
        "text_encoder": str(tiny_checkpoint / "text_encoder_2"),
        "tokenizer": str(tiny_checkpoint / "tokenizer_2"),
        "autoencoder": str(tiny_checkpoint / "vae"),
    }
    models = {
        _model_id(name): {"transformer": str(write(weights, config, tmp_path / f"{_model_id(name)}.safetensors"))}
        | others
        for name, (_, write) in writers.FORMATS.items()
    }
    server = serve(models=models, lora_root=GOLDENS / "adapters")
    with chromarpc.Client(server.target) as client:
        told = {model.id: {part.part: part.stored_as for part in model.parts} for model in client.list_models()}
        for name, (stored_as, _) in writers.FORMATS.items():
            small = {"model": _model_id(name), "width": 64, "height": 64, "sample_steps": 1}
            events = list(client.generate("a", **small))
            (prepared,) = (event for event in events if isinstance(event, chromarpc.Prepared))
            assert prepared.stored_as == told[_model_id(name)]["transformer"] == stored_as
            (plain,) = (event.image.sha256 for event in events if isinstance(event, chromarpc.ImageReady))
            (adapted,) = client.generate_images("a", loras=["aitk.safetensors"], **small)
            assert adapted.sha256 != plain


def test_a_damaged_transformer_stops_the_start_by_its_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    raw = (GOLDENS / "formats_hashed" / "q8_0.gguf").read_bytes()
    (folder / NAME).write_bytes(raw[: len(raw) // 2])
    settings = ServerSettings(
        port=0, device="cpu", model_folder={"chroma-mini": folder}, data_dir=tmp_path, preload=["chroma-mini"]
    )
    with pytest.raises(WeightsInvalid, match=r"chroma-mini\.safetensors: truncated: its tensors claim"):
        asyncio.run(App(settings).run())
