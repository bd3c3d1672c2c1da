"""One image on two CUDA devices, a pass of guidance each. Run by hand: `pytest -m gpu tests/gpu`.

The current device is `cuda:0` throughout, as it is for the thread of a pair that begins with it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chromarpc
from chromarpc_server.domain.errors import JobCancelled
from chromarpc_server.pipeline import (
    PROFILES,
    Checkpoint,
    Pipeline,
    TransformerPair,
    finished_steps,
    synchronize,
)
from tests.gpu.test_on_two_gpus import FILES, FIRST, REQUEST, SECOND, SIZE, server_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, this machine has {torch.cuda.device_count()}"
    ),
]
SEPARATE = ("exact", "preview-exact")
"""Profiles that make one pass after the other on one device."""
PACKED = ("reference", "fp8", "preview")
"""Profiles that pack both, and record steps."""


def _load(second: torch.device | None = SECOND, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    return Checkpoint.load(FILES, device=FIRST, dtype=dtype, second=second)


def _steps(pipeline: Pipeline, seed: int = 0) -> Any:
    embedding = pipeline.encode(pipeline.tokenize("a red circle"), pipeline.tokenize("blue"))
    return pipeline.denoise(
        embedding, width=SIZE, height=SIZE, steps=6, guidance_scale=4.0, seed=seed, noise_draw="float32"
    )


def _latents(pipeline: Pipeline, seed: int = 0) -> Tensor:
    *_, last = _steps(pipeline, seed)
    return last.latents.cpu()


def _adapter(checkpoint: Checkpoint, seed: int) -> Any:
    from bench.switching import random_adapter

    return random_adapter(checkpoint.master, 8, seed)


@pytest.mark.parametrize("profile", SEPARATE)
def test_where_passes_are_separate_a_pair_draws_the_bits_of_one(profile: str) -> None:
    one, two = _load(None), _load()
    wanted = [(_adapter(one, 1), 0.8)]
    alone, pair = (checkpoint.prepare(wanted, PROFILES[profile]) for checkpoint in (one, two))
    for seed in range(3):
        expected, found = _latents(alone, seed), _latents(pair, seed)
        assert torch.equal(found, expected)
        pixels = [drawn.decode(found.to(FIRST), SIZE, SIZE) for drawn in (alone, pair)]
        assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize("profile", PACKED)
def test_where_passes_are_packed_a_pair_always_draws_the_same_and_records_on_both(profile: str) -> None:
    checkpoint = _load()
    pipeline = checkpoint.prepare((), PROFILES[profile])
    pair = pipeline.transformer
    assert isinstance(pair, TransformerPair)
    runs_as_it_is = _latents(pipeline)
    recorded = _latents(pipeline)
    assert torch.equal(recorded, runs_as_it_is), "the first run has a step that was not recorded"
    assert torch.equal(_latents(checkpoint.prepare((), PROFILES[profile])), recorded)
    assert [transformer.run.recorded_count for transformer in (pair.first, pair.second)] == [1, 1]  # type: ignore[attr-defined]
    assert pipeline.fallbacks == ()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("profile", ["reference", "fp8"])
def test_a_pair_is_as_close_to_the_truth_as_one(profile: str) -> None:
    truth = _load(None, torch.float32).prepare((), PROFILES["reference"])
    expected = [_latents(truth, seed).float() for seed in range(16)]

    def error(checkpoint: Checkpoint) -> float:
        pipeline = checkpoint.prepare((), PROFILES[profile])
        found = [_latents(pipeline, seed).float() for seed in range(16)]
        return float(
            sum((mine - true).norm() / true.norm() for mine, true in zip(found, expected, strict=True)) / 16
        )

    # In float8 chroma-mini's steps differ from each other as much as from the truth; at full size they do not, as
    # bench.cfg_parallel shows.
    assert error(_load()) <= (1.3 if profile == "fp8" else 1.15) * error(_load(None))


def test_a_pair_passes_by_the_vectors_that_a_gpu_recorded(goldens: Path) -> None:
    from chromarpc_server.verify import bfloat16_cases
    from chromarpc_server.verify.report import Outcome
    from chromarpc_server.verify.vectors import Vectors

    folder = goldens / "h100_bf16_float8"
    weights = Vectors.read(folder / "transformer.safetensors")
    vectors = Vectors.read(folder / "pipeline.safetensors")
    for profile in ("exact", "reference"):
        made = [
            bfloat16_cases._prepared(weights.chroma_config(), weights.tensors, profile, device, torch.bfloat16)
            for device in (FIRST, SECOND)
        ]
        for number in vectors.cases():
            case = vectors.of(number)
            noise = case["noise_packed"].to(FIRST)
            found = bfloat16_cases._draw(TransformerPair(*made, SECOND), case, noise)
            assert bfloat16_cases._ratio(number, found, case).outcome is Outcome.PASS
            if profile == "exact":
                assert torch.equal(found, bfloat16_cases._draw(made[0], case, noise))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_switch_gives_both_the_same_bits_and_those_of_a_cold_build(profile: str) -> None:
    from bench.switching import _held

    checkpoint = _load()
    one, other = ([(_adapter(checkpoint, seed), 0.7)] for seed in (1, 2))
    pipeline = checkpoint.prepare(one, PROFILES[profile])
    pair = pipeline.transformer
    assert isinstance(pair, TransformerPair)
    first = _latents(pipeline)
    pair.switch(other)
    left, right = (dict(_held(transformer)) for transformer in (pair.first, pair.second))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.device, right[name].device) == (FIRST, SECOND)
        assert torch.equal(tensor.view(torch.uint8).cpu(), right[name].view(torch.uint8).cpu()), name
    second = _latents(pipeline)
    assert not torch.equal(first, second)
    assert torch.equal(second, _latents(checkpoint.prepare(other, PROFILES[profile])))
    pair.switch(one)
    assert torch.equal(first, _latents(pipeline))


def test_previews_are_drawn_while_the_next_step_is_computed_and_a_stop_leaves_both_idle() -> None:
    pipeline = _load().prepare((), PROFILES["reference"])
    expected = [step.predicted_x0.cpu() for step in _steps(pipeline)]
    shown = []
    for step in finished_steps(_steps(pipeline), FIRST, lambda _: None):
        shown.append(pipeline.preview(step, SIZE, SIZE, 64))
        assert torch.equal(step.predicted_x0.cpu(), expected[step.index])
    assert len(shown) == 6
    pauses = []

    def stop(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        for _ in finished_steps(_steps(pipeline), FIRST, stop):
            pass
    assert all(torch.cuda.current_stream(device).query() for device in (FIRST, SECOND))


def test_a_pairs_step_waits_for_the_host_as_little_as_one_devices() -> None:
    counts = []
    for second in (None, SECOND):
        pipeline = _load(second).prepare((), PROFILES["reference"])
        _latents(pipeline)
        steps = _steps(pipeline)
        next(steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in steps:
                    pass
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
        for device in (FIRST, SECOND):
            synchronize(device)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(("first", "second"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_a_server_of_a_pair_falls_back_on_nothing(first: str, second: str, tmp_path: Path) -> None:
    flags = ("--devices", f"{first},{second}", "--cfg-parallel", "--preload", "chroma-mini")
    with server_on(tmp_path, *flags) as (target, log), chromarpc.Client(target) as client:
        images = []
        for _ in range(3):
            image = client.generate_images("a red circle", **REQUEST)[0]
            assert image.prepared is not None
            assert (image.prepared.device_id, image.prepared.second_device) == (f"{first}+{second}", second)
            assert list(image.warnings) == []
            images.append(image.data)
        assert images[0] == images[1] == images[2]
        assert [word for word in ("unusable", "wrong", "unrecorded") if word in "".join(log)] == [], log
        assert list(client.server_info().device.fallbacks) == []
