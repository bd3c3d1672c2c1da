"""Samplers and schedules beyond the recorded vectors, which `verify` compares them with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chromarpc_server.domain.sampling_choices import FLOWMATCH, LEAST_STEPS, SAMPLERS, SCHEDULES, DrawingSettings
from chromarpc_server.pipeline.denoising import SamplingChoice
from chromarpc_server.pipeline.samplers import SAMPLERS_BY_NAME, NotComputable, evaluated_sigmas
from chromarpc_server.pipeline.sampling import make_scheduler
from chromarpc_server.pipeline.schedules import schedule_sigmas
from chromarpc_server.verify import verify

NOT_THE_REFERENCES = [name for name in SAMPLERS if name != FLOWMATCH]


def _sigmas(schedule: str, steps: int, shift: float | None = None, sampler: str = "euler") -> list[float]:
    return schedule_sigmas(schedule, steps, shift=shift, image_tokens=1024, sampler=sampler)


def test_every_sampler_that_requests_may_name_is_there_and_no_other() -> None:
    assert set(SAMPLERS_BY_NAME) == set(NOT_THE_REFERENCES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shift", [None, 0.2, 1.0, 3.0, 100.0])
def test_every_schedule_falls_from_noise_to_image(schedule: str, shift: float | None) -> None:
    for steps in (LEAST_STEPS.get(schedule, 1), 2, 7, 150):
        sigmas = _sigmas(schedule, steps, shift)
        assert len(sigmas) > 1
        assert all(one > other for one, other in pairwise(sigmas))
        assert sigmas[0] <= 1 + 1e-5
        assert 0 <= sigmas[-1] <= 1e-5


def test_where_the_lowest_level_counts_as_no_noise_normal_ends_with_it_and_sgm_uniform_does_not() -> None:
    assert [len(_sigmas(schedule, 8, 0.05)) for schedule in ("normal", "sgm_uniform")] == [9, 9]
    assert 0 < _sigmas("normal", 8, 0.05)[-1] < 1e-5
    *_, lowest, end = _sigmas("sgm_uniform", 8, 0.05)
    assert (lowest > 1e-4, end) == (True, 0.0)


@pytest.mark.parametrize("sampler", NOT_THE_REFERENCES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_every_sampler_ends_at_the_image_of_a_model_that_always_predicts_it(sampler: str, steps: int) -> None:
    image = torch.tensor([0.25, -2.0, 3.0], dtype=torch.float64)
    sigmas = _sigmas("simple", steps, sampler=sampler)
    done = list(SAMPLERS_BY_NAME[sampler](lambda x, sigma: image, torch.randn(3).double(), sigmas))
    assert len(done) == steps
    # UniPC's last level is 0.001, not 0.
    assert torch.allclose(done[-1].x, image, atol=0.02 if sampler.startswith("uni_pc") else 1e-9)


@pytest.mark.parametrize("sampler", NOT_THE_REFERENCES)
def test_a_sampler_calls_its_model_as_often_as_requests_are_told(sampler: str) -> None:
    calls = evaluated_sigmas(SAMPLERS_BY_NAME[sampler], _sigmas("beta", 6, sampler=sampler))
    per_step = SAMPLERS[sampler].calls_per_step
    assert 6 * per_step - per_step * (per_step - 1) // 2 == len(calls)
    assert all(0 < sigma <= 1 for sigma in calls)


@pytest.mark.parametrize("order", [("heun", 2), ("dpm_2", 2), ("lms", 2), ("dpmpp_2m", 2), ("euler", 1)])
def test_more_steps_come_closer_to_the_curve_by_the_order_of_the_sampler(order: tuple[str, int]) -> None:
    name, power = order

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x - sigma * (0.3 * x + sigma)

    def end(sampler: str, steps: int) -> float:
        sigmas = [1 - 0.9 * index / steps for index in range(steps + 1)]
        *_, last = SAMPLERS_BY_NAME[sampler](model, torch.ones(1, dtype=torch.float64), sigmas)
        return float(last.x)

    truth = end("heun", 4000)
    errors = [abs(end(name, steps) - truth) for steps in (40, 80)]
    assert errors[0] / errors[1] > 0.8 * 2**power


def test_the_references_schedule_is_the_same_for_every_sampler() -> None:
    scheduler = make_scheduler(1024, 9, torch.device("cpu"))
    assert torch.tensor(_sigmas(FLOWMATCH, 9)).allclose(scheduler.sigmas, rtol=1e-6)


def test_a_schedule_that_lacks_steps_says_so() -> None:
    with pytest.raises(ValueError, match="kl_optimal needs 2 steps or more, got 1"):
        _sigmas("kl_optimal", 1)
    with pytest.raises(ValueError, match="no schedule 'linear'"):
        _sigmas("linear", 4)


def test_guidance_is_left_out_where_the_settings_leave_it_out() -> None:
    comfyui, reference = SamplingChoice(settings=DrawingSettings.COMFYUI), SamplingChoice("heun")
    assert [comfyui.has_guidance(scale) for scale in (0.5, 1.0, 1.5)] == [True, False, True]
    assert [reference.has_guidance(scale) for scale in (0.5, 1.0, 1.5)] == [False, False, True]


def test_scipy_is_imported_by_no_other_schedule() -> None:
    code = (
        "import sys\n"
        "from chromarpc_server.pipeline.schedules import schedule_sigmas\n"
        "schedule_sigmas('simple', 4, shift=None, image_tokens=64, sampler='euler')\n"
        "assert 'scipy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The recorded vectors.


def _verify(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    out = io.StringIO()
    code = verify(folder, device="cpu", as_json=True, out=out)
    return code, {case["case"]: case for case in json.loads(out.getvalue())["cases"]}


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, dict[str, Any]]:
    code, cases = _verify(goldens / "comfyui")
    assert code == 0, [case for case in cases.values() if case["outcome"] == "FAIL"]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "count"),
    [("sigmas/", 120), ("trajectories/", 42), ("noise/", 11), ("tokens/", 60), ("t5_tiny_embeds/", 6),
     ("chroma_tiny/", 4)],
)  # fmt: skip
def test_everything_that_comfyui_was_recorded_with_passes(
    recorded: dict[str, dict[str, Any]], prefix: str, count: int
) -> None:
    passed = [name for name, case in recorded.items() if case["outcome"] == "PASS"]
    assert len([name for name in passed if name.startswith(f"comfyui/{prefix}")]) >= count


@pytest.mark.slow
def test_samplers_with_fresh_noise_are_skipped_with_the_reason(recorded: dict[str, dict[str, Any]]) -> None:
    skipped = {name: case["note"] for name, case in recorded.items() if case["outcome"] == "SKIP"}
    assert len(skipped) == 39
    assert all(
        name.startswith("comfyui/trajectories/") and "fresh noise" in note for name, note in skipped.items()
    )


@pytest.fixture
def copied(goldens: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with some of the files, beside the small models."""

    def copy(*names: str, models: bool = True) -> Path:
        folder = tmp_path / "comfyui"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((goldens / "comfyui" / name).read_bytes())
        if models:
            (tmp_path / "cpu_fp32").symlink_to(goldens / "cpu_fp32")
        return folder

    return copy


@pytest.mark.slow
def test_a_file_that_is_not_known_fails(copied: Callable[..., Path]) -> None:
    folder = copied("tokens.json", "README.md")
    (folder / "more.safetensors").write_bytes(b"")
    code, cases = _verify(folder)
    assert code == 1
    assert [name for name, case in cases.items() if case["outcome"] == "FAIL"] == ["comfyui/more.safetensors"]


@pytest.mark.slow
def test_a_schedule_that_nothing_is_recorded_of_verifies_nothing(copied: Callable[..., Path]) -> None:
    folder = copied("sigmas.json")
    recorded = json.loads((folder / "sigmas.json").read_text())
    variant = next(iter(recorded["sigmas"]))
    recorded["sigmas"][variant]["simple"] = {}
    (folder / "sigmas.json").write_text(json.dumps(recorded))
    code, cases = _verify(folder)
    assert code == 1
    failed = [name for name, case in cases.items() if case["outcome"] == "FAIL"]
    assert failed == [f"comfyui/sigmas/sigmas/{variant} simple"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5_tiny_embeds.safetensors", "chroma_tiny.safetensors"])
def test_small_models_that_are_not_there_are_a_failure(copied: Callable[..., Path], name: str) -> None:
    code, cases = _verify(copied(name, models=False))
    assert code == 1
    assert cases[f"comfyui/{name.removesuffix('.safetensors')}"]["outcome"] == "FAIL"


@pytest.mark.slow
def test_the_parent_of_the_folder_may_be_named_too(copied: Callable[..., Path]) -> None:
    folder = copied("chroma_tiny.safetensors")
    (folder.parent / "cpu_fp32").unlink()
    (folder.parent / "cpu_fp32").mkdir()
    models = Path(__file__).parents[1] / "goldens" / "cpu_fp32" / "transformer_tiny.safetensors"
    (folder.parent / "cpu_fp32" / models.name).symlink_to(models)
    code, cases = _verify(folder.parent)
    assert code == 0
    assert cases["comfyui/chroma_tiny/euler_beta"]["outcome"] == "PASS"


@pytest.mark.slow
def test_a_run_that_is_off_fails(copied: Callable[..., Path]) -> None:
    folder = copied("chroma_tiny.safetensors")
    path = folder / "chroma_tiny.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["heun_flash.latents"] += 1e-3
    save_file(tensors, path, metadata)
    code, cases = _verify(folder)
    assert code == 1
    failed = [name for name, case in cases.items() if case["outcome"] == "FAIL"]
    assert failed == ["comfyui/chroma_tiny/heun_flash"]


@pytest.mark.slow
def test_a_schedule_of_another_length_and_an_unknown_part_fail(copied: Callable[..., Path]) -> None:
    folder = copied("sigmas.json")
    value = json.loads((folder / "sigmas.json").read_text("utf-8"))
    value["sigmas"]["aura_1.0"]["beta"]["8"].pop(3)
    value["extra"] = {}
    (folder / "sigmas.json").write_text(json.dumps(value), "utf-8")
    _, cases = _verify(folder)
    failed = {name: case["note"] for name, case in cases.items() if case["outcome"] == "FAIL"}
    assert failed == {
        "comfyui/sigmas/sigmas/aura_1.0 beta": "9 noise levels instead of 8",
        "comfyui/sigmas/extra": "no part that is known here",
    }


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "shift"),
    [("uni_pc", "exponential", 50, None), ("uni_pc_bh2", "karras", 26, 0.01), ("deis", "normal", 4, 0.01)],
)
def test_a_sampler_without_numbers_for_a_schedule_says_so(
    sampler: str, schedule: str, steps: int, shift: float | None
) -> None:
    sigmas = _sigmas(schedule, steps, shift, sampler)
    with pytest.raises(NotComputable):
        evaluated_sigmas(SAMPLERS_BY_NAME[sampler], sigmas)


@pytest.mark.parametrize("sampler", NOT_THE_REFERENCES)
@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_every_sampler_has_numbers_for_what_people_draw_with(sampler: str, shift: float | None) -> None:
    for schedule in ("flowmatch", "simple", "beta", "normal", "sgm_uniform"):
        for steps in (1, 8, 26, 50):
            assert evaluated_sigmas(SAMPLERS_BY_NAME[sampler], _sigmas(schedule, steps, shift, sampler))
