"""Workflows of ComfyUI, drawn by a real server through the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from chromarpc import Client
from chromarpc.cli import app
from chromarpc.pictures.files import RECORD_KEY, read_picture
from tests.client.comfyui_workflows import Flow, as_bytes, changed, ksampler_flow
from tests.client.picture_files import png_with
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

RECORDED = GOLDENS / "adapters" / "aitk.safetensors"


def small_flow() -> Flow:
    sampled = {"steps": 3, "sampler_name": "euler", "scheduler": "beta"}
    return changed(ksampler_flow(), n8={"width": 64, "height": 96}, n9=sampled)


def generate(server: RunningServer, *arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["generate", "--model", "chroma-mini", *arguments], env={"CHROMARPC_TARGET": server.target}
    )


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.fixture
def drawing(
    server: RunningServer, lora_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningServer]:
    (lora_root / "styles").mkdir()
    shutil.copy(RECORDED, lora_root / "styles" / "ink.safetensors")
    monkeypatch.chdir(tmp_path)
    yield server
    shutil.rmtree(lora_root / "styles")


def test_a_workflow_is_drawn_as_its_request_says_and_the_picture_tells(drawing: RunningServer) -> None:
    Path("flow.json").write_bytes(as_bytes(small_flow()))
    result = generate(drawing, "--comfyui", "flow.json", "-o", "drawn.png", "--quiet")
    assert result.exit_code == 0, result.stderr
    picture = Path("drawn.png").read_bytes()
    recorded = json.loads(read_picture(picture).texts[RECORD_KEY])["request"]
    (prompt,) = recorded["prompts"]
    assert (recorded["settings"], recorded["loras"][0]["path"]) == ("comfyui", "styles/ink.safetensors")
    assert {name: prompt[name] for name in ("width", "height", "sample_steps", "seed", "neg", "use_neg")} == {
        "width": 64,
        "height": 96,
        "sample_steps": 3,
        "seed": 43,
        "neg": "blurry",
        "use_neg": True,
    }
    assert (prompt["sampler"], prompt["schedule"], prompt["shift"]) == ("euler", "beta", 1.0)

    Path("ComfyUI_00001_.png").write_bytes(png_with({"prompt": small_flow()}))
    assert generate(drawing, "--comfyui", "ComfyUI_00001_.png", "-o", "again.png", "--quiet").exit_code == 0
    assert Path("again.png").read_bytes() == picture
    reference = ("--settings", "reference", "-o", "reference.png", "--quiet")
    assert generate(drawing, "--comfyui", "flow.json", *reference).exit_code == 0
    assert pixels("reference.png") != pixels("drawn.png")


def test_a_sampler_that_cannot_be_promised_is_the_servers_refusal(drawing: RunningServer) -> None:
    Path("flow.json").write_bytes(as_bytes(changed(small_flow(), n9={"sampler_name": "euler_ancestral"})))
    result = generate(drawing, "--comfyui", "flow.json")
    assert result.exit_code == 2
    assert "prompts.0.sampler: euler_ancestral draws fresh noise" in result.stderr
    assert not Path("out.png").exists()


def test_an_adapter_that_the_server_has_not_is_named_before_anything_is_queued(drawing: RunningServer) -> None:
    Path("flow.json").write_bytes(as_bytes(changed(small_flow(), n4={"lora_name": "pen.safetensors"})))
    with Client(drawing.target) as client:
        jobs = client.list_jobs()
        result = generate(drawing, "--comfyui", "flow.json")
        assert client.list_jobs() == jobs
    assert result.exit_code == 2
    assert "node 4 (LoraLoaderModelOnly), lora_name: this server has no adapter pen.safetensors" in result.stderr
