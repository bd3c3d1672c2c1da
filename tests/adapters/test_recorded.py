"""The recorded files: against the recorded weights, and those against float64 arithmetic of our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chromarpc_server.pipeline.adapters import read_adapter
from tests.adapters import oracle
from tests.adapters.conftest import Model
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
FOLDER = GOLDENS / "adapters"
TOLERANCE = 1e-6


def strength_of(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float(file.metadata()["strength"])


def test_every_recorded_file_is_tested() -> None:
    assert {path.name.removesuffix(".expected.safetensors") for path in FOLDER.glob("*.expected.*")} == set(
        FORMATS
    )


@pytest.mark.parametrize("name", FORMATS)
def test_gives_the_recorded_weights_and_no_others(model: Model, name: str) -> None:
    expected_path = FOLDER / f"{name}.expected.safetensors"
    expected = load_file(expected_path)
    strength = strength_of(expected_path)
    adapter = read_adapter(FOLDER / f"{name}.safetensors", model.targets)
    assert adapter.format == FORMATS[name]
    assert adapter.unmatched == ()
    assert set(adapter.changes) == set(expected)
    for key, weight in model.weights.items():
        found = adapter.apply(key, weight, strength)
        if key in expected:
            assert oracle.relative(found, oracle.array(expected[key])) <= TOLERANCE
            assert oracle.relative(weight, oracle.array(expected[key])) > 0.05, "the base would pass as well"
        else:
            assert found is weight


@pytest.mark.parametrize("name", FORMATS)
def test_one_wrong_factor_is_seen(model: Model, name: str, tmp_path: Path) -> None:
    """The comparison above can fail: any tensor that counts, one part in a thousand larger, is noticed."""
    expected_path = FOLDER / f"{name}.expected.safetensors"
    expected = load_file(expected_path)
    tensors = load_file(FOLDER / f"{name}.safetensors")
    ignored = name == "aitk_lokr_full"
    for key in tensors:
        wrong = tmp_path / "wrong.safetensors"
        save_file({**tensors, key: tensors[key] * 1.001}, wrong)
        adapter = read_adapter(wrong, model.targets)
        worst = max(
            oracle.relative(adapter.apply(to, model.weights[to], strength_of(expected_path)), oracle.array(weight))
            for to, weight in expected.items()
        )
        assert (worst > TOLERANCE) == (not (ignored and key.endswith(".alpha"))), key


@pytest.mark.parametrize("name", ["aitk", "mixed_rank_alpha", "kohya", "loha", "aitk_lokr_lowrank", "kohya_dora"])
def test_the_recorded_weights_agree_with_float64(weights: dict[str, oracle.Tensor], name: str) -> None:
    """Neither side of the first test: the recorded weights against the formulas."""
    expected_path = FOLDER / f"{name}.expected.safetensors"
    tensors = load_file(FOLDER / f"{name}.safetensors")
    strength = strength_of(expected_path)
    for key, recorded in load_file(expected_path).items():
        module = key.removesuffix(".weight")
        stems = (f"diffusion_model.{module}.", f"lora_unet_{module.replace('.', '_')}.")
        parts = {at.removeprefix(stem): t for stem in stems for at, t in tensors.items() if at.startswith(stem)}
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        base = oracle.array(weights[key])
        if "hada_w1_a" in parts:
            difference = oracle.loha({at.removeprefix("hada_"): t for at, t in parts.items()}, alpha or 0)
        elif "lokr_w1" in parts:
            difference = oracle.lokr({at.removeprefix("lokr_"): t for at, t in parts.items()}, alpha or 0)
        else:
            down = parts.get("lora_A.weight", parts.get("lora_down.weight"))
            up = parts.get("lora_B.weight", parts.get("lora_up.weight"))
            assert down is not None
            assert up is not None
            difference = oracle.low_rank(down, up, alpha)
        changed = base + strength * difference
        if "dora_scale" in parts:
            assert strength == 1
            changed = oracle.dora(base, difference, parts["dora_scale"])
        assert np.linalg.norm(oracle.array(recorded) - changed) <= TOLERANCE * np.linalg.norm(changed)
