"""The benches measure the trainer's profiles beside the reference's, on chroma-mini and at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cfg_parallel, error, mismatch, scale, speed, switching, synthetic
from chromarpc_server.pipeline import PROFILES, Checkpoint, CheckpointFiles

pytestmark = pytest.mark.slow


def result(bench: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What a bench writes when it is started with these options."""
    monkeypatch.setattr("sys.argv", [bench.__name__, *options, "--out", str(out)])
    bench.main()
    written: dict[str, Any] = json.loads(out.read_text())
    return written


def test_speed_measures_both_forms_with_and_without_an_adapter_and_says_what_its_path_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--profiles", "reference", "preview", "preview-exact", "--ranks", "0", "4"]
    options += ["--sizes", "64x64", "--steps", "1", "--runs", "1"]
    found = result(speed, tmp_path / "speed.json", monkeypatch, *options)
    measured = [(f["profile"], f["rank"], f["modules"]) for f in found["figures"]]
    assert measured == [
        ("reference", 0, 0),
        ("preview", 0, 0),
        ("preview", 4, 24),
        ("preview-exact", 0, 0),
        ("preview-exact", 4, 24),
    ]
    assert {"device", "versions", "commit"} <= found.keys()
    _, bare, ranked, *_ = found["figures"]
    cost = found["path_costs"][0]
    assert (cost["profile"], cost["rank"]) == ("preview", 4)
    assert cost["seconds"] == pytest.approx(ranked["total_s"] - bare["total_s"])
    assert cost["percent"] == pytest.approx(100 * cost["seconds"] / bare["total_s"])
    assert "low-rank path, preview-exact, rank 4 on 24 modules, 64x64" in capsys.readouterr().out


def test_a_run_that_is_cut_short_leaves_the_figures_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "speed.json"
    measure = speed.measure
    calls = []

    def cut_short(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(speed, "measure", cut_short)
    with pytest.raises(KeyboardInterrupt):
        result(
            speed, written, monkeypatch, "--profiles", "reference", "preview", "--sizes", "64x64", "--steps", "1"
        )
    assert [f["profile"] for f in json.loads(written.read_text())["figures"]] == ["reference"]


def test_switching_says_where_an_adapter_goes_and_gives_a_cold_builds_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--size", "mini", "--ranks", "4", "--repeats", "2"]
    options += ["--profiles", "reference", "preview", "preview-exact"]
    found = result(switching, tmp_path / "switching.json", monkeypatch, *options)["figures"]
    assert [(f["profile"], f["adapter"], f["quantize"], f["place"]) for f in found] == [
        ("reference", "lora", True, "merged"),
        ("preview", "lora", True, "beside"),
        ("preview", "lora", False, "merged"),
        ("preview-exact", "lora", True, "beside"),
        ("preview", "dora", True, "merged"),
    ]
    assert all(f["equal_bits"] and f["modules"] == 24 and f["rank"] == 4 for f in found)


def test_different_factors_are_not_called_equal_bits() -> None:
    device = switching.torch.device("cpu")
    master = switching.random_master(switching.MINI, device)
    adapters = [switching.random_adapter(master, 4, seed) for seed in (1, 2)]
    for profile in ("preview", "preview-exact"):
        made = []
        for adapter in adapters:
            transformer = switching.allocate(
                switching.Case(profile), switching.MINI, master, device, switching.torch.bfloat16
            )
            transformer.switch([(adapter, 1.0)])
            made.append(transformer)
        assert switching.same_bits(made[0], made[0])
        assert not switching.same_bits(*made)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """For tensors as small as the tiny checkpoint's more only wait for each other."""
    threads = switching.torch.get_num_threads()
    switching.torch.set_num_threads(1)
    yield
    switching.torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_a_pair_is_measured_beside_one_device(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = CheckpointFiles(
        tiny_checkpoint / "chroma-mini.safetensors",
        *(tiny_checkpoint / name for name in ("text_encoder_2", "tokenizer_2", "vae")),
    )
    cpu = switching.torch.device("cpu")
    tiny = Checkpoint.load(files, device=cpu, dtype=switching.torch.float32)
    monkeypatch.setattr(cfg_parallel, "mini", lambda _: tiny)
    options = ["--profiles", "reference", "--sizes", "64x64", "--steps", "1", "--runs", "1"]
    found = result(cfg_parallel, tmp_path / "cfg_parallel.json", monkeypatch, *options)
    (figure,) = found["figures"]
    assert (figure["profile"], figure["size"], figure["same_again"]) == ("reference", "64x64", True)
    assert figure["ratio"] == pytest.approx(figure["one_s"] / figure["pair_s"])
    assert max(figure["one_error"], figure["pair_error"]) < 1e-4
    assert [switch["profile"] for switch in found["switches"]] == ["reference"]
    assert found["exact_is_equal"]


def test_error_measures_each_function_by_the_form_that_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--side", "64", "--steps", "2", "--ranks", "0", "4"]
    found = result(error, tmp_path / "error.json", monkeypatch, *options)["errors"]
    assert [(e["profile"], e["rank"]) for e in found] == [
        ("exact", 0),
        ("reference", 0),
        ("fp8", 0),
        ("preview-exact", 0),
        ("preview", 0),
        ("preview-exact", 4),
        ("preview", 4),
    ]
    own = {e["rank"]: e["latents"] for e in found if e["profile"] == "preview-exact"}
    for e in found:
        if e["profile"] == "preview":
            assert e["latents_ratio"] == pytest.approx(e["latents"] / own[e["rank"]])
            # bf16 against float32 of the same weights: a truth of another function would be much further off.
            assert 0.001 < e["latents"] < 0.1


def changed(name: str) -> dict[int, set[str]]:
    """By sample of the recorded run's last step, the fields that a mismatch draws with another value."""
    change = next(each.change for each in mismatch.MISMATCHES if each.name.startswith(name))
    found = {}
    for sample, right in mismatch.recorded(mismatch.RECORDED, [500]):
        wrong = change(right, sample)
        found[sample.index] = {f.name for f in fields(right) if getattr(right, f.name) != getattr(wrong, f.name)}
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", {0: set(), 1: set(), 2: set()}),
        ("merged before", {0: {"merged_first"}, 1: {"merged_first"}, 2: {"merged_first"}}),
        ("negative text ignored", {0: set(), 1: set(), 2: {"negative"}}),
        ("`walk_seed` ignored", {0: set(), 1: set(), 2: {"seed"}}),
        ("multiplier ignored", {0: set(), 1: set(), 2: {"multiplier"}}),
        ("`[trigger]`", {0: {"prompt"}, 1: {"prompt"}, 2: {"prompt"}}),
        ("another step's", {0: {"adapter"}, 1: {"adapter"}, 2: {"adapter"}}),
    ],
)
def test_a_mismatch_changes_one_thing_where_the_run_has_it(name: str, expected: dict[int, set[str]]) -> None:
    assert changed(name) == expected


def test_a_mismatch_is_measured_against_the_trainers_own_sample() -> None:
    artist = mismatch.Artist(speed.mini(switching.torch.device("cpu")))
    [_, (sample, right), _] = mismatch.recorded(mismatch.RECORDED, [500])
    theirs = sample.file.read_bytes()
    found = mismatch.compare(mismatch.as_jpeg(artist.draw(right)), theirs)
    without = mismatch.compare(mismatch.as_jpeg(artist.draw(mismatch.replace(right, adapter=None))), theirs)
    assert found.psnr_db > 40
    assert without.psnr_db < 30


def test_scale_says_what_the_front_costs_beside_devices_that_only_take_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--counts", "2", "--jobs", "1", "--step-ms", "3", "--held-ms", "0.5"]
    found = result(scale, tmp_path / "scale.json", monkeypatch, *options)
    (figure,) = found["figures"]
    assert (figure["count"], figure["jobs"], figure["ratio"]) == (2, 2, 1.0)
    assert figure["step_ms"] >= 3.0
    assert figure["thread_lag_p99_ms"] > 0
    assert figure["lag_p99_ms"] >= figure["lag_p50_ms"] > 0


def test_the_synthetic_checkpoint_of_the_gpus_benches_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"d_model": switching.MINI.context_in_dim, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    monkeypatch.setattr(synthetic, "FULL", switching.MINI)
    monkeypatch.setattr(synthetic, "T5_XXL", {**synthetic.T5_XXL, **small})
    monkeypatch.setattr(synthetic, "FLUX_VAE", {**synthetic.FLUX_VAE, "block_out_channels": [32] * 4})
    made = synthetic.checkpoint(torch.device("cpu"))
    assert made.stored_as == "bf16"
    pipeline = made.prepare([(switching.random_adapter(made.master, 8, 1), 1.0)], PROFILES["reference"])
    *_, last = pipeline.denoise(
        pipeline.encode(pipeline.tokenize("a")),
        width=32,
        height=32,
        steps=1,
        guidance_scale=4.0,
        seed=1,
        noise_draw="float32",
    )
    assert last.latents.isfinite().all()
