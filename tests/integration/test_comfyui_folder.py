"""A ComfyUI folder is served by one flag: its models are listed, drawn from and told about truthfully."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import chromarpc
from chromarpc.v1 import model_service_pb2
from tests.comfyui_folder import MINI, write_comfyui_folder
from tests.conftest import RunningServer, start_server

MODEL = "chroma1-hd-merge"
LORAS = MINI.parent / "loras"
SMALL: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 2.0,
    "sampler": "flowmatch",
    "schedule": "flowmatch",
}


def _lora(folder: Path, name: str, base: str) -> None:
    save_file(load_file(LORAS / "hollow_shapes.safetensors"), folder / name, {"ss_sd_model_name": base})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comfyui_folder(tmp_path_factory.mktemp("comfyui") / "models", "Chroma1-HD merge.safetensors")


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    loras = folder / "loras"
    _lora(loras, "for_base.safetensors", "Chroma1-Base.safetensors")
    _lora(loras, "for_hd.safetensors", "chroma1-hd-fp8.safetensors")
    running = start_server(
        comfyui=folder,
        model={"from-a-file": {"transformer": str(MINI / "chroma-mini.safetensors"), "width": 64, "height": 64,
                               "text_encoder": str(MINI / "text_encoder_2"), "autoencoder": str(MINI / "vae"),
                               "steps": 2, "guidance": 1, "profile": "exact", "base_name": "me/mine"}},
        alias={"chroma": MODEL},
        lora_root=loras,
        data_dir=tmp_path_factory.mktemp("data"),
        grace_s=0,
        preload=[MODEL],
    )  # fmt: skip
    yield running
    running.stop()


def models(server: RunningServer) -> dict[str, model_service_pb2.Model]:
    with chromarpc.Client(server.target) as client:
        return {model.id: model for model in client.list_models()}


def pixels(image: chromarpc.GeneratedImage) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(image.data)))


def test_what_was_found_is_listed_with_its_parts(served: RunningServer, folder: Path) -> None:
    found = models(served)
    assert list(found) == ["chroma", "chroma1-hd", "chroma1-flash", "chroma-mini", "from-a-file", MODEL]
    model = found[MODEL]
    assert (model.weights_present, model.resident, model.fetch_command) == (True, True, "")
    parts = {part.part: part for part in model.parts}
    assert [parts[name].source for name in ("transformer", "text_encoder", "tokenizer", "autoencoder")] == [
        "Chroma1-HD merge.safetensors",
        "t5xxl_mini.safetensors",
        "bundled:chroma_mini/tokenizer_2",
        "ae.safetensors",
    ]
    assert [parts[name].stored_as for name in parts] == ["bf16", "bf16", "", "bf16"]
    assert all(part.present and not part.problem for part in model.parts)
    assert len(parts["transformer"].revision) == 64, "hashed when it was loaded"
    assert str(folder) not in str(model), "where it lies is the server's own business"


def test_a_model_tells_its_base_and_its_defaults(served: RunningServer) -> None:
    found = models(served)
    hd, mine = found[MODEL], found["from-a-file"]
    assert hd.base_name == "lodestones/Chroma1-HD"
    assert (hd.defaults.sampler, hd.defaults.schedule, hd.defaults.shift) == ("euler", "beta", 1.0)
    assert (hd.defaults.sample_steps, hd.defaults.guidance_scale) == (26, 3.5)
    assert (mine.base_name, mine.defaults.sample_steps, mine.defaults.profile) == ("me/mine", 2, "exact")
    assert (mine.defaults.sampler, mine.defaults.HasField("shift")) == ("flowmatch", False)


def test_what_is_missing_is_told_part_by_part(served: RunningServer) -> None:
    flash = models(served)["chroma1-flash"]
    assert (flash.weights_present, flash.fetch_command) == (False, "chromarpc-server fetch chroma1-flash")
    assert flash.parts[0].source == "lodestones/Chroma1-Flash:Chroma1-Flash.safetensors"
    assert not flash.parts[0].present
    with chromarpc.Client(served.target) as client, pytest.raises(chromarpc.WeightsMissing) as caught:
        client.generate_images("a", model="chroma1-flash")
    assert "its transformer (lodestones/Chroma1-Flash:Chroma1-Flash.safetensors)" in caught.value.message
    assert caught.value.metadata["parts"].split(",")[0] == "transformer"


def test_its_pictures_are_those_of_the_same_weights_in_their_own_layout(served: RunningServer) -> None:
    loras = {"for_hd.safetensors": 0.8}
    with chromarpc.Client(served.target) as client:
        ours, theirs = (
            pixels(client.generate_images("a hlw red circle", model=model, loras=loras, **SMALL)[0])
            for model in (MODEL, "chroma-mini")
        )
    assert (ours == theirs).all()


def test_an_adapter_for_another_checkpoint_draws_and_is_warned_about(served: RunningServer) -> None:
    codes = {}
    with chromarpc.Client(served.target) as client:
        for model, lora in ((MODEL, "for_base"), (MODEL, "for_hd"), ("chroma-mini", "for_hd")):
            events = list(client.generate("a", model=model, loras=[f"{lora}.safetensors"], **SMALL))
            (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
            assert isinstance(events[-1], chromarpc.Completed)
            codes[model, lora] = [(warning.code, warning.field) for warning in prepared.warnings]
        inspection = client.inspect_lora("for_base.safetensors", model=MODEL)
    told = [("LORA_FOR_ANOTHER_BASE", "loras.0.path")]
    assert codes == {(MODEL, "for_base"): told, (MODEL, "for_hd"): [], ("chroma-mini", "for_hd"): told}
    (warning,) = inspection.warnings
    assert warning.code == "LORA_FOR_ANOTHER_BASE"
    assert "Chroma1-Base.safetensors" in warning.message
    assert "lodestones/Chroma1-HD" in warning.message


def test_an_alias_and_a_model_of_the_settings_are_drawn_from(served: RunningServer) -> None:
    with chromarpc.Client(served.target) as client:
        (aliased,) = client.generate_images("a", model="chroma", **SMALL)
        accepted = next(iter(client.generate("a", model="from-a-file")))
    assert pixels(aliased).shape == (64, 64, 3)
    assert isinstance(accepted, chromarpc.Accepted)
    prompt = accepted.prompts[0]
    assert (prompt.width, prompt.sample_steps, prompt.guidance_scale, accepted.profile) == (64, 2, 1.0, "exact")


def test_nothing_was_written_to_the_folder(served: RunningServer, folder: Path) -> None:
    assert models(served)[MODEL].weights_present
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "diffusion_models/Chroma1-HD merge.safetensors",
        "text_encoders/t5xxl_mini.safetensors",
        "vae/ae.safetensors",
        "vae/config.json",
        "loras/for_base.safetensors",
        "loras/for_hd.safetensors",
    }
