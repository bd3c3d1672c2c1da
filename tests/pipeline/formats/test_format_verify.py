"""`verify` compares every file of a folder of formats, and fails on whatever it does not understand there."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chromarpc_server.verify import verify
from tests.pipeline.formats.layouts import FORMATS

pytestmark = pytest.mark.slow

T5 = "t5xxl_fp16.safetensors"
EXPECTED = "expected/t5_fp16.expected.safetensors"
ENTRY = {"part": "text_encoder", "expected": EXPECTED, "rel": 0.0, "about": "one file"}


def _verify(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    out = io.StringIO()
    code = verify(folder, device="cpu", as_json=True, out=out)
    return code, {case["case"]: case for case in json.loads(out.getvalue())["cases"]}


def _failures(folder: Path) -> dict[str, str]:
    code, cases = _verify(folder)
    failed = {name: case["note"] for name, case in cases.items() if case["outcome"] == "FAIL"}
    assert code == (1 if failed else 0)
    return failed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One text encoder, below a folder that is laid out like tests/goldens."""
    formats = tmp_path / "goldens" / "formats"
    (formats / "expected").mkdir(parents=True)
    for name in (T5, EXPECTED, "t5_config.json", "README.md"):
        shutil.copy(FORMATS / name, formats / name)
    _index(formats, {T5: ENTRY})
    return formats


def _index(formats: Path, files: dict[str, object], refuse: dict[str, str] | None = None) -> None:
    (formats / "index.json").write_text(json.dumps({"files": files, "refuse": refuse or {}}))


def test_every_recorded_format_passes_and_every_other_file_is_refused() -> None:
    code, cases = _verify(FORMATS)
    assert code == 0, [case for case in cases.values() if case["outcome"] == "FAIL"]
    index = json.loads((FORMATS / "index.json").read_text())
    assert {f"formats/{name}" for name in index["files"]} <= set(cases)
    assert {f"formats/refuse/{name}" for name in index["refuse"]} <= set(cases)
    assert {"formats/all_in_one.safetensors/text_encoder", "formats/all_in_one.safetensors/vae"} <= set(cases)
    assert all("KeyError" not in case["note"] for case in cases.values())
    assert all(case["outcome"] == "PASS" for name, case in cases.items() if name.startswith("formats/"))


def test_the_parent_and_the_folder_itself_are_the_same(folder: Path, tmp_path: Path) -> None:
    _, below = _verify(folder.parent)
    _, itself = _verify(folder)
    renamed = shutil.copytree(folder, tmp_path / "other")
    _, other = _verify(renamed)
    assert set(below) == set(itself) == set(other) == {f"formats/{T5}"}
    assert below[f"formats/{T5}"]["outcome"] == "PASS"


def test_a_single_other_value_fails(folder: Path) -> None:
    tensors = load_file(folder / EXPECTED)
    tensors["shared.weight"][3, 5] += 1e-3
    save_file(tensors, folder / EXPECTED)
    (note,) = _failures(folder).values()
    assert "worst shared.weight" in note


@pytest.mark.parametrize(
    "name", ["stray.safetensors", "refuse/stray.gguf", "expected/stray.safetensors", ".hidden"]
)
def test_a_file_that_the_index_does_not_name_fails(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"something")
    assert list(_failures(folder)) == [f"formats/{name}"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "part": "upscaler"}, "'upscaler'"),
        ({**ENTRY, "part": "vae"}, "this is a T5 text encoder"),
        ({**ENTRY, "expected": "../outside.safetensors"}, "names '../outside.safetensors'"),
        ({**ENTRY, "expected": "expected/absent.safetensors"}, "is not there"),
        ({**ENTRY, "rel": "small"}, "ValueError"),
        ([], "says [] of it"),
    ],
)
def test_an_entry_that_is_not_understood_fails(entry: object, message: str, folder: Path) -> None:
    _index(folder, {T5: entry})
    assert message in _failures(folder)[f"formats/{T5}"]


def test_a_file_that_is_named_and_absent_fails(folder: Path) -> None:
    (folder / T5).unlink()
    assert "is not there" in _failures(folder)[f"formats/{T5}"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"files": 3}'])
def test_an_index_that_cannot_be_used_fails(content: str | None, folder: Path) -> None:
    (folder / "index.json").unlink()
    if content is not None:
        (folder / "index.json").write_text(content)
    assert "formats/index.json" in _failures(folder)


def test_a_file_to_refuse_that_is_taken_fails(folder: Path) -> None:
    (folder / "refuse").mkdir()
    shutil.copy(folder / T5, folder / "refuse" / T5)
    _index(folder, {T5: ENTRY}, {T5: "text encoder: in truth a good one"})
    assert "was accepted as text_encoder" in _failures(folder)[f"formats/refuse/{T5}"]


def test_sizes_that_lie_beside_are_compared(folder: Path) -> None:
    config = json.loads((folder / "t5_config.json").read_text())
    (folder / "t5_config.json").write_text(json.dumps({**config, "num_heads": 8, "d_kv": 8}))
    (note,) = _failures(folder).values()
    assert "num_heads is 4, should be 8" in note


def test_shards_and_other_prefixes_are_read_as_well(tmp_path: Path) -> None:
    """What the recorded folder does not hold: several shards, and ComfyUI's newer prefixes in one file."""
    formats = tmp_path / "formats"
    shutil.copytree(FORMATS / "expected", formats / "expected")
    for name in ("t5_config.json", "vae_config.json"):
        shutil.copy(FORMATS / name, formats / name)
    whole = FORMATS / "diffusers" / "transformer"
    shards = formats / "diffusers" / "transformer"
    shards.mkdir(parents=True)
    shutil.copy(whole / "config.json", shards)
    tensors = load_file(whole / "diffusion_pytorch_model.safetensors")
    # q, k and v of one product come to lie in different shards.
    parts: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for index, (name, tensor) in enumerate(tensors.items()):
        parts[index % 3][name] = tensor
    names = [f"diffusion_pytorch_model-0000{part + 1}-of-00003.safetensors" for part in range(3)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, shards / name)
    found = {name: file for part, file in zip(parts, names, strict=True) for name in part}
    index = {"metadata": {}, "weight_map": found}
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    renamed = {
        name.replace("cond_stage_model.", "text_encoders.").replace("first_stage_model.", "vae."): tensor
        for name, tensor in load_file(FORMATS / "all_in_one.safetensors").items()
    }
    renamed["text_encoders.t5xxl.logit_scale"] = torch.tensor(4.6)
    config = {"config": json.dumps({"axes_dim": [8, 12, 12], "theta": 10000})}
    save_file(renamed, formats / "all_in_one.safetensors", config)
    recorded = json.loads((FORMATS / "index.json").read_text())["files"]
    files = {name: recorded[name] for name in ("diffusers/transformer", "all_in_one.safetensors")}
    used = {
        Path(path).name
        for entry in files.values()
        for path in (entry["expected"], *entry.get("also", {}).values())
    }
    for path in (formats / "expected").iterdir():
        if path.name not in used:
            path.unlink()
    _index(formats, files)
    assert _failures(tmp_path) == {}
