"""`verify` passes on what was recorded, and fails on anything else."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chromarpc_server.verify import verify

pytestmark = pytest.mark.slow


def _verify(folder: Path) -> tuple[int, dict[str, Any]]:
    out = io.StringIO()
    code = verify(folder, device="cpu", as_json=True, out=out)
    return code, json.loads(out.getvalue())


@pytest.fixture(scope="module")
def report(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the reference's vectors; those of the trainer, of formats and of ComfyUI have tests of their own."""
    folder = tmp_path_factory.mktemp("goldens")
    for group in goldens.iterdir():
        if group.is_dir() and group.name not in ("preview", "formats", "comfyui"):
            (folder / group.name).symlink_to(group)
    code, report = _verify(folder)
    assert code == 0, [case for case in report["cases"] if case["outcome"] == "FAIL"]
    return report


@pytest.mark.parametrize(
    "group",
    [
        "cpu_fp32/transformer_forward", "cpu_fp32/schedule", "cpu_fp32/noise_packed/",
        "cpu_fp32/noise_packed_legacy",
        "cpu_fp32/pipeline_fp32", "cpu_fp32/t5_embeds", "cpu_fp32/lora_merge_float8", "h100_bf16_float8/pipeline",
        "h100_bf16_float8/t5", "adapters/aitk", "requests/accepted", "requests/rejected",
        "torchao/float8 random rows", "torchao/float8 edge rows",
    ],
)  # fmt: skip
def test_every_group_of_vectors_was_run_and_passes(report: dict[str, Any], group: str) -> None:
    cases = [case for case in report["cases"] if case["case"].startswith(group)]
    assert cases
    assert {case["outcome"] for case in cases} <= {"PASS", "SKIP"}
    assert any(case["outcome"] == "PASS" for case in cases)
    assert all(case["note"] for case in cases if case["outcome"] == "SKIP")


def test_the_reference_profile_is_no_further_from_the_truth_than_the_reference(report: dict[str, Any]) -> None:
    notes = [
        case["note"] for case in report["cases"] if case["case"].endswith(" reference") and "ratio" in case["note"]
    ]
    ratios = [float(note.split()[1]) for note in notes]
    assert len(ratios) >= 3
    assert max(ratios) <= 1.10


def _copy(goldens: Path, folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(goldens / name, folder / name)
    return folder


FORWARD = ("cpu_fp32/transformer_tiny.safetensors", "cpu_fp32/transformer_forward.safetensors")


def test_an_empty_folder_verifies_nothing_and_fails(tmp_path: Path) -> None:
    code, report = _verify(tmp_path)
    assert code == 1
    assert report["summary"] == {"pass": 0, "fail": 0, "skip": 0}


def test_a_folder_without_vectors_is_told_how_it_should_be_laid_out(tmp_path: Path) -> None:
    out = io.StringIO()
    assert verify(tmp_path, device="cpu", as_json=False, out=out) == 1
    assert "no known vectors; it should be laid out like tests/goldens" in out.getvalue()


def test_one_folder_of_bfloat16_vectors_is_verified_when_it_is_named_itself(goldens: Path) -> None:
    code, report = _verify(goldens / "h100_bf16_float8")
    assert code == 0
    assert any(case["case"].startswith("h100_bf16_float8/t5/") for case in report["cases"])


def test_a_part_of_the_folder_is_enough(goldens: Path, tmp_path: Path) -> None:
    code, report = _verify(_copy(goldens, tmp_path, *FORWARD))
    assert code == 0
    assert report["summary"]["fail"] == 0


def test_vectors_without_their_weights_are_skipped_with_the_reason(goldens: Path, tmp_path: Path) -> None:
    code, report = _verify(_copy(goldens, tmp_path, FORWARD[1]))
    assert code == 1
    assert report["cases"][0]["outcome"] == "SKIP"
    assert "transformer_tiny" in report["cases"][0]["note"]


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_a_single_wrong_or_nan_element_fails(goldens: Path, tmp_path: Path, value: float) -> None:
    path = _copy(goldens, tmp_path, *FORWARD) / FORWARD[1]
    tensors = load_file(path)
    tensors["0.out"][0, 0, 0] += value * float(tensors["0.out"].norm())
    save_file(tensors, path)
    code, report = _verify(tmp_path)
    assert code == 1
    assert {case["case"].split()[0] for case in report["cases"] if case["outcome"] == "FAIL"} == {
        "cpu_fp32/transformer_forward/0"
    }


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\xff" * 8])
def test_a_file_that_cannot_be_read_is_a_failure_not_a_traceback(
    goldens: Path, tmp_path: Path, content: bytes
) -> None:
    path = _copy(goldens, tmp_path, *FORWARD) / FORWARD[1]
    path.write_bytes(content)
    code, report = _verify(tmp_path)
    assert code == 1
    assert report["cases"][0]["note"].startswith("SafetensorsError")


def test_sizes_and_counts_are_read_from_the_files(goldens: Path, tmp_path: Path) -> None:
    """Vectors nobody has seen: one more case, of another number and another grid."""
    path = _copy(goldens, tmp_path, *FORWARD) / FORWARD[1]
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    tensors |= {name.replace("1.", "17.", 1): t.clone() for name, t in tensors.items() if name.startswith("1.")}
    save_file(tensors, path)
    code, report = _verify(tmp_path)
    assert code == 0
    assert any(case["case"].startswith("cpu_fp32/transformer_forward/17") for case in report["cases"])


def test_rows_are_compared_with_the_installed_torchao_and_the_share_is_told(goldens: Path, tmp_path: Path) -> None:
    code, report = _verify(_copy(goldens, tmp_path, "cpu_fp32/schedule.json"))
    assert code == 0
    cases = [case for case in report["cases"] if case["case"].startswith("torchao/float8")]
    assert [case["outcome"] for case in cases] == ["PASS", "PASS"]
    assert all("% of the values" in case["note"] for case in cases)


def test_lines_are_for_people(goldens: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    assert verify(_copy(goldens, tmp_path, *FORWARD), device="cpu", as_json=False, out=out) == 0
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("PASS  cpu_fp32/transformer_forward/0 masked  rel ")
    assert "passed, 0 failed, 0 skipped" in lines[-1]
    assert torch.__version__ in lines[-1]
