"""`verify` on what the trainer recorded: it passes, whichever folder is given, and fails on anything else."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chromarpc_server.pipeline.trainer.arithmetic import one_thread
from chromarpc_server.verify import verify
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

RECORDED = GOLDENS / "preview"
RUN = RECORDED / "runs" / "exact"


def _verify(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    out = io.StringIO()
    code = verify(folder, device="cpu", as_json=True, out=out)
    return code, json.loads(out.getvalue())["cases"]


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    code, cases = _verify(RECORDED / "cpu")
    assert code == 0, [case for case in cases if case["outcome"] == "FAIL"]
    return cases


@pytest.mark.parametrize(
    ("group", "least"),
    [("quantized", 13), ("text", 10), ("forward", 20), ("noise", 10), ("sampling", 10), ("sizes", 14)],
)
def test_every_group_of_the_trainers_vectors_was_run_and_passes(
    report: list[dict[str, Any]], group: str, least: int
) -> None:
    cases = [case for case in report if case["case"].startswith(f"preview/cpu/{group}/")]
    assert sum(case["outcome"] == "PASS" for case in cases) >= least
    assert {case["outcome"] for case in cases} <= {"PASS", "SKIP"}
    assert all(case["note"] for case in cases if case["outcome"] == "SKIP")


def test_the_fused_form_is_the_trainers_function_in_every_recorded_case(report: list[dict[str, Any]]) -> None:
    fused = [case for case in report if case["case"].endswith(" fused")]
    assert len(fused) >= 20
    assert {case["outcome"] for case in fused} == {"PASS"}
    untold = {case["case"] for case in fused if "from the truth" not in case["note"]}
    assert all("/sampling/none." in case for case in untold), "recorded without a truth beside them"


def test_on_a_cpu_the_fused_form_as_served_is_as_close_to_the_truth_as_the_trainer(
    report: list[dict[str, Any]],
) -> None:
    served = [case for case in report if case["case"].endswith(" served")]
    assert len(served) >= 10
    assert {case["outcome"] for case in served} == {"PASS"}
    assert all(case["note"].startswith("ratio ") for case in served)


def test_nothing_else_is_told_where_only_the_trainers_vectors_are(report: list[dict[str, Any]]) -> None:
    assert {case["case"].split("/")[0] for case in report} == {"preview"}


@pytest.mark.parametrize("given", ["", "preview", "preview/cpu"])
def test_cases_have_the_same_names_whichever_folder_is_given(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "preview" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(RECORDED / "cpu" / "sizes.json", folder)
    code, cases = _verify(tmp_path / given)
    assert code == 0
    assert [case["case"] for case in cases][:2] == ["preview/cpu/sizes/64x64", "preview/cpu/sizes/72x104"]


def test_a_folder_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    for name in ("noise.safetensors", "sizes.json"):
        (tmp_path / name[:5]).mkdir()
        shutil.copy(RECORDED / "cpu" / name, tmp_path / name[:5])
    code, cases = _verify(tmp_path)
    assert code == 0
    assert {case["case"].rsplit("/", 1)[0] for case in cases} == {"preview/cpu/noise", "preview/cpu/sizes"}


def test_a_file_that_nobody_understands_is_a_failure(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "cpu" / "sizes.json", tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"other")
    (tmp_path / "noise.safetensors").write_bytes(b"damaged")
    code, cases = _verify(tmp_path)
    assert code == 1
    failed = {case["case"]: case["note"] for case in cases if case["outcome"] == "FAIL"}
    assert set(failed) == {"preview/cpu/other.safetensors", "preview/cpu/noise"}
    assert failed["preview/cpu/other.safetensors"] == "this file is not understood"


def test_a_text_encoder_may_lack_one_of_the_names_of_its_embedding(tmp_path: Path) -> None:
    tensors = load_file(RECORDED / "cpu" / "t5.safetensors")
    names = {"shared.weight", "encoder.embed_tokens.weight"}
    kept = next(tensors[name] for name in sorted(names) if name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    tensors["encoder.embed_tokens.weight"] = kept
    save_file(tensors, tmp_path / "t5.safetensors", _metadata(RECORDED / "cpu" / "t5.safetensors"))
    text = RECORDED / "cpu" / "text.safetensors"
    few = {name: tensor for name, tensor in load_file(text).items() if name.startswith("0.")}
    save_file(few, tmp_path / "text.safetensors", _metadata(text))
    code, cases = _verify(tmp_path)
    assert code == 0, cases
    assert any(case["case"].startswith("preview/cpu/text/0/") for case in cases)


@pytest.mark.parametrize("name", ["quantized", "forward"])
def test_a_wrong_value_fails(tmp_path: Path, name: str) -> None:
    for part in ("transformer", "lora"):
        shutil.copy(RECORDED / "cpu" / f"{part}.safetensors", tmp_path)
    recorded = RECORDED / "cpu" / f"{name}.safetensors"
    tensors = load_file(recorded)
    if name == "forward":
        wrong = "qfloat8.float32.1.0.0"
        tensors = {key: value for key, value in tensors.items() if key.startswith(("0.", wrong))}
        tensors[f"{wrong}.truth"] = tensors[f"{wrong}.truth"] + 1e-3
    else:
        tensors = {key: value for key, value in tensors.items() if key.startswith(("base.", "qint8."))}
        wrong = next(key for key in sorted(tensors) if key.endswith(".dequantized"))
        tensors[wrong][0, 0] += 1
    save_file(tensors, tmp_path / recorded.name, _metadata(recorded))
    code, cases = _verify(tmp_path)
    assert code == 1
    where = {"quantized": "quantized/qint8", "forward": "forward/qfloat8.float32.1.0/0 fused"}
    assert [case["case"] for case in cases if case["outcome"] == "FAIL"] == [f"preview/cpu/{where[name]}"]


def test_a_runs_samples_are_drawn_again(tmp_path: Path) -> None:
    """One of them: the one of the fewest steps on the smallest picture, with an adapter and a negative prompt."""
    expected = RUN / "expected.safetensors"
    metadata = _metadata(expected)
    samples = [s for s in json.loads(metadata["samples"]) if (s["step"], s["index"]) == (250, 2)]
    metadata["samples"] = json.dumps(samples)
    shutil.copytree(RUN / "hlw_outlines", tmp_path / "runs" / "any" / "hlw_outlines")
    save_file(load_file(expected), tmp_path / "runs" / "any" / "expected.safetensors", metadata)
    with one_thread():
        code, cases = _verify(tmp_path / "runs")
    assert code == 0, cases
    told = {case["case"]: case for case in cases}
    assert told["preview/runs/any/000000250/2 fused"]["outcome"] == "PASS"
    assert told["preview/runs/any median"]["outcome"] == "PASS"
    exact = told["preview/runs/any/000000250/2 exact"]
    assert exact["outcome"] in ("PASS", "SKIP")
    assert exact["outcome"] == "PASS" or "another order" in exact["note"] or "recorded with torch" in exact["note"]
