"""The recorded formats, the reference's merge bit for bit, and each kind's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.pipeline.adapters import read_adapter
from tests.pipeline.adapters.conftest import Shapes, rel
from tests.tiny_checkpoint import GOLDENS

FORMATS = {
    "aitk": "ai-toolkit LoRA",
    "aitk_lokr_full": "ai-toolkit LoKr",
    "aitk_lokr_lowrank": "ai-toolkit LoKr",
    "diffusers_peft": "diffusers LoRA",
    "full_diff": "ai-toolkit full difference",
    "kohya": "kohya LoRA",
    "kohya_dora": "kohya DoRA",
    "loha": "kohya LoHa",
    "mixed_rank_alpha": "ai-toolkit LoRA",
    "onetrainer_legacy": "OneTrainer LoRA",
}


def _recorded() -> list[str]:
    return sorted(
        path.name.removesuffix(".expected.safetensors")
        for path in (GOLDENS / "adapters").glob("*.expected.safetensors")
    )


@pytest.mark.parametrize("name", _recorded())
def test_a_recorded_adapter_gives_the_recorded_weights(
    name: str, base: dict[str, Tensor], targets: Shapes
) -> None:
    path = GOLDENS / "adapters" / f"{name}.expected.safetensors"
    with safe_open(path, "pt") as file:
        strength = float(file.metadata()["strength"])
    expected = load_file(path)
    adapter = read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", targets)
    assert adapter.targets == set(expected)
    assert adapter.format == FORMATS[name]
    assert adapter.unmatched == adapter.unsupported == ()
    for key, tensor in expected.items():
        before = base[key].clone()
        assert rel(adapter.apply(key, base[key], strength), tensor) <= 1e-6
        assert torch.equal(base[key], before)


def test_every_recorded_format_is_known_by_name() -> None:
    assert set(_recorded()) == set(FORMATS)


def _merged() -> list[str]:
    with safe_open(GOLDENS / "cpu_fp32" / "lora_merge_float8.safetensors", "pt") as file:
        return sorted(name for name in file.keys() if name.endswith(".merged"))  # noqa: SIM118


@pytest.fixture(scope="module")
def merges() -> dict[str, Tensor]:
    return load_file(GOLDENS / "cpu_fp32" / "lora_merge_float8.safetensors")


@pytest.mark.parametrize("name", _merged())
def test_a_merge_into_bf16_is_the_references_bit_for_bit(name: str, merges: dict[str, Tensor]) -> None:
    base = {key.removeprefix("base."): tensor for key, tensor in merges.items() if key.startswith("base.")}
    path = GOLDENS / "cpu_fp32" / "lora_aitk.safetensors"
    adapter = read_adapter(path, {f"{module}.weight": tuple(t.shape) for module, t in base.items()})
    module = next(module for module in base if name.removesuffix(".merged").endswith(f".{module}"))
    multiplier = float(name.removesuffix(f".{module}.merged"))
    assert torch.equal(adapter.apply(f"{module}.weight", base[module], multiplier), merges[name])


def test_the_header_and_the_hash_are_told(tmp_path: Path, targets: Shapes) -> None:
    path = GOLDENS / "cpu_fp32" / "lora_aitk.safetensors"
    adapter = read_adapter(path, targets)
    assert adapter.metadata["ss_base_model_version"] == "chroma"
    assert len(adapter.sha256) == 64
    assert adapter.size_bytes == path.stat().st_size
    assert adapter.ranks == (6,)
