"""Adapters that are inspected through the real client and a real server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chromarpc
from chromarpc import Client
from tests.conftest import RunningServer
from tests.integration.loras.recorded import RECORDED, sha256_of
from tests.tiny_checkpoint import GOLDENS

FORMATS = sorted(path.stem for path in RECORDED.glob("*.safetensors") if ".expected" not in path.name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_recorded_format_is_inspected(client: Client, root: Path, name: str) -> None:
    """Norms are compared with the recorded weights: what was really added, block by block."""
    shutil.copy(RECORDED / f"{name}.safetensors", root)
    found = client.inspect_lora(f"{name}.safetensors")
    assert (found.model, found.sha256) == ("chroma-mini", sha256_of(RECORDED / f"{name}.safetensors"))
    assert found.dtypes == ("F32",)
    assert found.unmatched_key_count == 0
    assert found.warnings == ()

    before = load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
    expected = RECORDED / f"{name}.expected.safetensors"
    with safe_open(expected, "pt") as file:
        strength = float(file.metadata()["strength"])
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    weights: dict[str, float] = {}
    for parameter, after in load_file(expected).items():
        block = re.sub(r"(\.\d+)\..*|\.linear\.weight", r"\1", parameter)
        added = (after.double() - before[parameter].double()) / strength
        squares[block] = squares.get(block, 0.0) + float(added.square().sum())
        weights[block] = weights.get(block, 0.0) + float(before[parameter].double().square().sum())
        counts[block] = counts.get(block, 0) + int((added.abs().sum(-1) != 0).sum()) * added.shape[-1]
    assert [block.block for block in found.blocks] == sorted(squares)
    for block in found.blocks:
        if block.has_magnitude:
            assert name == "kohya_dora"
        else:
            assert block.norm == pytest.approx(squares[block.block] ** 0.5, rel=1e-4)
            relative = (squares[block.block] / weights[block.block]) ** 0.5
            assert block.relative_norm == pytest.approx(relative, rel=1e-3)  # the server's weights are bf16
            if name != "full_diff":  # whose bias has one dimension
                assert block.rms == pytest.approx((squares[block.block] / counts[block.block]) ** 0.5, rel=1e-4)


def test_an_inspection_tells_ranks_alphas_and_metadata(client: Client, root: Path) -> None:
    save_file(
        {
            "diffusion_model.img_in.lora_A.weight": torch.ones(2, 64, dtype=torch.bfloat16),
            "diffusion_model.img_in.lora_B.weight": torch.zeros(64, 2, dtype=torch.bfloat16),
            "diffusion_model.img_in.alpha": torch.tensor(4.0),
            "text\x1b[31m\nencoder.lora_A.weight": torch.ones(1, 1),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 1),
        },
        root / "a.safetensors",
        {"ss_base_model_version": "flux1\x1b", "name": "x" * 5000},
    )
    found = client.inspect_lora("a.safetensors", model="chroma-mini")
    assert (found.ranks, found.alphas, found.dtypes) == ((2,), (4.0,), ("BF16",))
    assert (found.matched_key_count, found.unmatched_key_count, found.changed_parameter_count) == (3, 2, 1)
    assert "text\\x1b[31m\\nencoder.lora_A.weight" in found.unmatched_keys
    assert [(part.name, part.key_count) for part in found.unsupported] == [("text encoder", 1)]
    assert len(found.metadata["name"]) == 2000
    assert [warning.code for warning in found.warnings] == [
        "LORA_FOR_ANOTHER_MODEL", "LORA_WITHOUT_EFFECT", "LORA_PART_UNSUPPORTED", "LORA_KEYS_UNMATCHED",
    ]  # fmt: skip
    assert "flux1\\x1b" in found.warnings[0].message
    events = client.generate(
        "a", model="chroma-mini", width=64, height=64, sample_steps=1, loras=["a.safetensors"]
    )
    (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
    assert [(warning.code, warning.message) for warning in prepared.warnings] == [
        (warning.code, warning.message) for warning in found.warnings
    ]
    assert {warning.field for warning in prepared.warnings} == {"loras.0.path"}


def test_an_alpha_that_float16_cannot_hold_is_told(client: Client, root: Path) -> None:
    tensors = load_file(RECORDED / "aitk_lokr_full.safetensors")
    alphas = [name for name in tensors if name.endswith(".alpha")]
    for name in alphas:
        tensors[name] = torch.tensor(9999999999.0).to(torch.float16)
    save_file(tensors, root / "a.safetensors")
    found = client.inspect_lora("a.safetensors")
    assert [warning.code for warning in found.warnings] == ["LORA_ALPHA_NOT_FINITE"]
    assert found.alphas == ()


def test_a_file_below_the_root_is_named_by_the_hash_that_an_inspection_tells(client: Client, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root / "hashed.safetensors")
    sha256 = client.inspect_lora("hashed.safetensors").sha256
    (listed,) = [lora for lora in client.list_loras() if lora.path == "hashed.safetensors"]
    assert listed.sha256 == sha256
    assert client.inspect_lora(f"sha256:{sha256}").sha256 == sha256


def test_what_cannot_be_inspected_is_told_as_a_generation_would(client: Client, root: Path) -> None:
    (root / "garbage.safetensors").write_bytes(b"\0" * 100)
    tensors = load_file(RECORDED / "aitk.safetensors")
    save_file({**tensors, next(iter(tensors)): tensors[next(iter(tensors))] * torch.inf}, root / "inf.safetensors")
    save_file({"a.lora_A.weight": torch.ones(1, 1), "a.lora_B.weight": torch.ones(1, 1)}, root / "b.safetensors")
    (root.parent / "secret.safetensors").write_bytes((RECORDED / "aitk.safetensors").read_bytes())
    for path, kind in (
        ("garbage.safetensors", chromarpc.LoraInvalid),
        ("inf.safetensors", chromarpc.LoraInvalid),
        ("b.safetensors", chromarpc.LoraIncompatible),
        ("nothing.safetensors", chromarpc.LoraNotFound),
        ("../secret.safetensors", chromarpc.LoraNotFound),
        (str(root.parent / "secret.safetensors"), chromarpc.LoraNotFound),
        (f"sha256:{'0' * 64}", chromarpc.LoraNotFound),
        ("", chromarpc.LoraNotFound),
    ):
        with pytest.raises(kind) as caught:
            client.inspect_lora(path)
        assert caught.value.violations[0].field == "path", path
        assert str(root.parent) not in str(caught.value)
    with pytest.raises(chromarpc.ModelNotFound):
        client.inspect_lora("b.safetensors", model="nothing")


def test_an_inspection_needs_the_models_files(
    serve: Callable[..., RunningServer], root: Path, tmp_path: Path
) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    (tmp_path / "empty").mkdir()
    with (
        Client(serve(lora_root=root, model_folder={"chroma": tmp_path / "empty"}).target) as client,
        pytest.raises(chromarpc.WeightsMissing, match="chromarpc-server fetch chroma"),
    ):
        client.inspect_lora("aitk.safetensors")
