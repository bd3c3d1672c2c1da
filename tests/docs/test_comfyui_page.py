"""docs/comfyui.md: its workflow becomes the request that it shows, and it names every node that is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chromarpc import parse_request_json
from chromarpc.comfyui import read_workflow
from chromarpc.comfyui.model_line import ADAPTERS, LOADERS, SHIFTS
from chromarpc.comfyui.sampling_line import SAMPLERS
from chromarpc.comfyui.text_line import ENCODER_LOADERS
from tests.client.comfyui_workflows import served_model

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "comfyui.md").read_text("utf-8")


def test_the_workflow_becomes_the_request_that_is_shown() -> None:
    shown = PAGE.split("```json\n")[1].split("```")[0]
    workflow = read_workflow(DOCS / "comfyui-workflow.json")
    models = [served_model("chroma-mini", "bundled:chroma_mini/chroma-mini.safetensors")]
    assert workflow.request(models) == parse_request_json(shown).request
    assert json.loads(shown)["settings"] == "comfyui"


@pytest.mark.parametrize("kind", sorted({*LOADERS, *ADAPTERS, *SHIFTS, *ENCODER_LOADERS, *SAMPLERS}))
def test_every_node_that_is_known_is_named(kind: str) -> None:
    assert f"`{kind}`" in PAGE or kind == "DualCLIPLoaderGGUF"  # the same as the one without
