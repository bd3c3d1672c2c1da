"""That the recorded weights would catch a mistake, and that they are what the formulas say, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.pipeline.adapters import read_adapter
from tests.pipeline.adapters import oracle
from tests.pipeline.adapters.conftest import Shapes
from tests.pipeline.adapters.test_goldens import FORMATS
from tests.tiny_checkpoint import GOLDENS

FOLDER = GOLDENS / "adapters"
TOLERANCE = 1e-6


def strength_of(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float(file.metadata()["strength"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_one_wrong_factor_is_seen(base: dict[str, Tensor], targets: Shapes, name: str, tmp_path: Path) -> None:
    """The comparison above can fail: any tensor that counts, one part in a thousand larger, is noticed."""
    expected_path = FOLDER / f"{name}.expected.safetensors"
    expected = load_file(expected_path)
    tensors = load_file(FOLDER / f"{name}.safetensors")
    ignored = name == "aitk_lokr_full"
    for key in tensors:
        wrong = tmp_path / "wrong.safetensors"
        save_file({**tensors, key: tensors[key] * 1.001}, wrong)
        adapter = read_adapter(wrong, targets)
        worst = max(
            oracle.relative(adapter.apply(to, base[to], strength_of(expected_path)), oracle.array(weight))
            for to, weight in expected.items()
        )
        assert (worst > TOLERANCE) == (not (ignored and key.endswith(".alpha"))), key


@pytest.mark.parametrize("name", ["aitk", "mixed_rank_alpha", "kohya", "loha", "aitk_lokr_lowrank", "kohya_dora"])
def test_the_recorded_weights_agree_with_float64(base: dict[str, Tensor], name: str) -> None:
    """Neither side of the first test: the recorded weights against the formulas."""
    expected_path = FOLDER / f"{name}.expected.safetensors"
    tensors = load_file(FOLDER / f"{name}.safetensors")
    strength = strength_of(expected_path)
    for key, recorded in load_file(expected_path).items():
        module = key.removesuffix(".weight")
        stems = (f"diffusion_model.{module}.", f"lora_unet_{module.replace('.', '_')}.")
        parts = {at.removeprefix(stem): t for stem in stems for at, t in tensors.items() if at.startswith(stem)}
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        before = oracle.array(base[key])
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
        changed = before + strength * difference
        if "dora_scale" in parts:
            assert strength == 1
            changed = oracle.dora(before, difference, parts["dora_scale"])
        assert np.linalg.norm(oracle.array(recorded) - changed) <= TOLERANCE * np.linalg.norm(changed)
