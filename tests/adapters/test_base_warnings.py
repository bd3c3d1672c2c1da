"""What an adapter's header says of the model that it was trained on, and when that is a warning."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from chromarpc_server.adapters.warnings import adapter_warnings

HD = "lodestones/Chroma1-HD"


def codes(metadata: dict[str, str], base_name: str = HD) -> list[str]:
    adapter: Any = SimpleNamespace(
        metadata=metadata, has_effect=True, unsupported=(), unmatched=(), unused_alphas=(), unread_scales=()
    )
    return [warning.code for warning in adapter_warnings(adapter, "loras.0.path", base_name)]


def config(**model: str) -> str:
    return json.dumps({"config": {"process": [{"type": "sd_trainer", "model": model}]}})


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_sd_model_name": "Chroma1-Base.safetensors", "ss_base_model_version": "chroma"},
        {"ss_base_model_version": "Chroma1-Base"},
        {"name_or_path": "lodestones/Chroma1-Base"},
        {"job": config(name_or_path="lodestones/Chroma1-Base", arch="chroma")},
        {"ot_config": json.dumps({"base_model_name": "/models/chroma-unlocked-v37.safetensors"})},
        {"lora_adapter_metadata": json.dumps({"transformer.base_model_name_or_path": "somebody/merge"})},
    ],
)
def test_a_header_that_names_another_checkpoint_is_warned_about(metadata: dict[str, str]) -> None:
    assert codes(metadata) == ["LORA_FOR_ANOTHER_BASE"]
    assert codes(metadata, "") == [], "nobody says what the model's base is"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_base_model_version": "chroma", "software": '{"name": "ai-toolkit"}'},
        {"modelspec.architecture": "chroma/lora"},
        {"ss_sd_model_name": "Chroma1-HD-fp8.safetensors"},
        {"job": config(name_or_path=HD, arch="chroma")},
        {"config": json.dumps({"network": {"name_or_path": "somebody/lora"}})},
        {"config": "{not json"},
        {"config": "[" * 100_000},
        {"config": json.dumps({"model": {"name_or_path": ["lodestones/Chroma1-Base"]}})},
    ],
)
def test_a_header_that_names_this_one_or_none_is_not(metadata: dict[str, str]) -> None:
    assert codes(metadata) == []


@pytest.mark.parametrize("architecture", ["flux1", "chroma_radiance", "zeta_chroma"])
def test_another_architecture_is_another_model_and_no_other_base(architecture: str) -> None:
    assert codes({"ss_base_model_version": architecture, "ss_sd_model_name": "x"}) == ["LORA_FOR_ANOTHER_MODEL"]
