"""The settings `comfyui`, samplers and negative text through a checkpoint and its pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.domain.sampling_choices import FLOWMATCH, SAMPLERS, DrawingSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Checkpoint,
    CheckpointFiles,
    Pipeline,
    PromptEmbedding,
    SamplingChoice,
    finished_steps,
)
from chromarpc_server.pipeline.models.weighted_text import MAX_UNPADDED_TOKENS, tokenize_weighted
from chromarpc_server.pipeline.sampling import unpack
from chromarpc_server.verify.report import distance
from chromarpc_server.verify.vectors import Vectors
from tests.tiny_checkpoint import GOLDENS, write_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
COMFYUI = DrawingSettings.COMFYUI
RECORDED = Vectors.read(GOLDENS / "comfyui" / "chroma_tiny.safetensors")
RUNS: dict[str, dict[str, Any]] = json.loads(RECORDED.metadata["runs"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Stored in float32, as the recorded runs were computed."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("float32") / "checkpoint")
    weights = folder / "chroma-mini.safetensors"
    recorded = Vectors.read(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
    save_file(dict(recorded.tensors), weights, {"config": recorded.metadata["config"]})
    return _load(folder)


@pytest.fixture(scope="module")
def stored_in_bfloat16(tiny_checkpoint: Path) -> Checkpoint:
    return _load(tiny_checkpoint)


def _load(folder: Path, second: torch.device | None = None) -> Checkpoint:
    files = CheckpointFiles(
        folder / "chroma-mini.safetensors", folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae"
    )
    return Checkpoint.load(files, device=CPU, dtype=torch.float32, second=second)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> Pipeline:
    return checkpoint.prepare((), PROFILES["reference"], rounded=False)


def _texts(recorded: dict[str, Tensor]) -> PromptEmbedding:
    pairs = [(recorded[name], torch.ones(recorded[name].shape[:2])) for name in ("positive", "negative")]
    return PromptEmbedding(*pairs[0], *pairs[1])


def _steps(pipeline: Pipeline, choice: SamplingChoice, **given: Any) -> list[Any]:
    embedding = given.pop("embedding", None) or pipeline.encode(pipeline.tokenize("a b", choice.settings))
    arguments = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "seed": 5, "noise_draw": "float32"}
    drawn = pipeline.denoise(embedding, **{**arguments, **given}, choice=choice)
    return list(finished_steps(drawn, CPU, lambda _: None))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_comfyui_comes_out_of_the_pipeline(pipeline: Pipeline, name: str) -> None:
    facts, recorded = RUNS[name], RECORDED.under(f"{name}.")
    height, width = (8 * side for side in recorded["noise"].shape[2:])
    choice = SamplingChoice(facts["sampler"], facts["scheduler"], 1.0, COMFYUI)
    steps = _steps(
        pipeline,
        choice,
        embedding=_texts(recorded),
        width=width,
        height=height,
        steps=facts["steps"],
        guidance_scale=facts["cfg"],
        seed=facts["seed"],
    )
    assert steps[0].sigmas == tuple(recorded["sigmas"].tolist())
    assert [step.total for step in steps] == [facts["steps"]] * facts["steps"]
    latents = unpack(steps[-1].latents, width, height) / 0.3611 + 0.1159
    assert distance(latents, recorded["latents"])[0] < 1e-5
    for step, predicted in zip(steps, recorded["denoised"], strict=True):
        assert distance(unpack(step.predicted_x0, width, height), predicted)[0] < 1e-5


class _Counting:
    """A transformer that counts its passes."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self.passes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def velocity(self, texts: Sequence[Any], timesteps: Tensor, grid: tuple[int, int]) -> Any:
        compute = self._transformer.velocity(texts, timesteps, grid)

        def counted(latents: Tensor, index: int) -> Any:
            self.passes.append(len(texts))
            return compute(latents, index)

        return counted


def _passes(pipeline: Pipeline, choice: SamplingChoice, guidance_scale: float) -> list[int]:
    counting = _Counting(pipeline.transformer)
    counted = Pipeline(**{**vars(pipeline), "transformer": counting})
    _steps(counted, choice, guidance_scale=guidance_scale)
    return counting.passes


@pytest.mark.parametrize("settings", DrawingSettings)
def test_at_guidance_1_each_call_is_a_single_pass(pipeline: Pipeline, settings: DrawingSettings) -> None:
    """Flash, as people run it: few steps, and nothing computed twice."""
    assert _passes(pipeline, SamplingChoice("heun", "beta", 1.0, settings), 1.0) == [1] * 7
    assert _passes(pipeline, SamplingChoice("euler", "beta", 1.0, settings), 1.0) == [1] * 4
    assert _passes(pipeline, SamplingChoice("euler", "beta", 1.0, settings), 2.0) == [2] * 4
    below = 2 if settings is COMFYUI else 1
    assert _passes(pipeline, SamplingChoice("euler", "beta", 1.0, settings), 0.5) == [below] * 4


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != FLOWMATCH])
@pytest.mark.parametrize("settings", DrawingSettings)
def test_every_sampler_draws_in_steps_of_the_schedule(
    stored_in_bfloat16: Checkpoint, sampler: str, settings: DrawingSettings
) -> None:
    rounded = settings is DrawingSettings.REFERENCE
    pipeline = stored_in_bfloat16.prepare((), PROFILES["reference"], rounded=rounded)
    steps = _steps(pipeline, SamplingChoice(sampler, "beta", None, settings), steps=3)
    assert [step.index for step in steps] == [0, 1, 2]
    assert all(torch.isfinite(step.latents).all() and step.latents.dtype == torch.float32 for step in steps)
    exact = [1000 * sigma for sigma in steps[0].sigmas[:-1]]
    seen = [step.timestep for step in steps]
    if rounded:
        assert seen == torch.tensor(exact).bfloat16().tolist()
    else:
        assert seen == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("schedule", ["simple", "beta", FLOWMATCH])
def test_the_references_sampler_takes_any_schedule_and_shift(
    stored_in_bfloat16: Checkpoint, schedule: str
) -> None:
    pipeline = stored_in_bfloat16.prepare((), PROFILES["reference"])
    choice = SamplingChoice(schedule=schedule, shift=2.0)
    steps = _steps(pipeline, choice)
    assert steps[0].sigmas == pytest.approx(choice.sigmas(4, 16), rel=1e-6)
    euler = _steps(pipeline, SamplingChoice("euler", schedule, 2.0))
    assert distance(steps[-1].latents, euler[-1].latents)[0] < 1e-5  # in float32 there is nothing to round


def test_a_schedule_of_more_steps_than_were_asked_for_is_drawn_and_told_whole(pipeline: Pipeline) -> None:
    steps = _steps(pipeline, SamplingChoice("euler", "ddim_uniform", 1.0, COMFYUI), steps=12)
    assert [step.index for step in steps] == list(range(13))
    assert {step.total for step in steps} == {13}
    assert steps[0].sigma < 1


def test_the_profiles_that_repeat_the_references_operations_take_samplers_too(
    stored_in_bfloat16: Checkpoint,
) -> None:
    choice = SamplingChoice("heun", "simple", 1.0)
    ends = [
        _steps(stored_in_bfloat16.prepare((), PROFILES[name]), choice)[-1].latents
        for name in ("exact", "reference")
    ]
    assert distance(*ends)[0] < 1e-5


@pytest.mark.parametrize("settings", DrawingSettings)
def test_a_pair_of_devices_draws_with_samplers_what_one_draws(
    stored_in_bfloat16: Checkpoint, tiny_checkpoint: Path, settings: DrawingSettings
) -> None:
    rounded = settings is DrawingSettings.REFERENCE
    choice = SamplingChoice("heun", "beta", 1.0, settings)
    ends = [
        _steps(found.prepare((), PROFILES["reference"], rounded=rounded), choice)[-1].latents
        for found in (stored_in_bfloat16, _load(tiny_checkpoint, second=CPU))
    ]
    assert distance(*ends)[0] < 1e-5


# Weights and text without rounding.


def test_weights_and_text_encoder_are_the_files_own(checkpoint: Checkpoint, pipeline: Pipeline) -> None:
    stored = load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
    for name, parameter in pipeline.transformer.model.named_parameters():  # type: ignore[attr-defined]
        assert torch.equal(parameter, stored[name])
    text = load_file(GOLDENS / "cpu_fp32" / "t5_tiny.safetensors")
    for name, parameter in pipeline.text_encoder.model.named_parameters():
        assert torch.equal(parameter, text[name])
    rounded = checkpoint.prepare((), PROFILES["reference"])
    changed = dict(rounded.transformer.model.named_parameters())  # type: ignore[attr-defined]
    name = "double_blocks.0.img_attn.qkv.weight"
    assert not torch.equal(changed[name], stored[name])
    assert rounded.text_encoder is checkpoint.text_encoder


def test_where_only_float8_has_room_weights_are_rounded_and_said_to_be(stored_in_bfloat16: Checkpoint) -> None:
    plan = MemoryPlan("float8", "host", "host", tile_autoencoder=False, record_graphs=False)
    small = Checkpoint(**{**_fields(stored_in_bfloat16), "memory": plan})
    profile = PROFILES["reference"]
    assert profile.must_round(small.memory)
    assert not profile.must_round(stored_in_bfloat16.memory)
    assert PROFILES["fp8"].must_round(stored_in_bfloat16.memory)
    assert small.allocate(profile, rounded=False).rounded
    assert small.missing_bytes(profile, None, rounded=False) == 0
    assert MemoryChoice().weights == "auto"


def _fields(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}


def test_text_is_neither_padded_nor_cut_at_512(pipeline: Pipeline) -> None:
    tokens = pipeline.tokenize("a " * 600, COMFYUI)
    assert tokens.ids.shape == (1, tokens.token_count)
    assert tokens.token_count > 512
    assert tokens.cut_count == 0
    embedding = pipeline.encode(tokens)
    assert embedding.embeds.shape[1] == tokens.token_count
    assert embedding.unconditional_embeds.shape[1] == 1
    as_long = pipeline.tokenize("a" * 510, COMFYUI)
    assert as_long.token_count == 512
    assert pipeline.encode(as_long).unconditional_embeds.shape[1] == 1
    padded = pipeline.encode(pipeline.tokenize("a"))
    assert padded.embeds.shape[1] == padded.unconditional_embeds.shape[1] == 512


def test_a_prompt_without_end_is_cut_where_memory_would_be(pipeline: Pipeline) -> None:
    tokens = pipeline.tokenize("a " * 3000, COMFYUI)
    assert tokens.token_count == MAX_UNPADDED_TOKENS
    assert tokens.cut_count > 0


def test_a_weight_moves_its_words_and_leaves_others_alone(pipeline: Pipeline) -> None:
    plain, weighted = (
        pipeline.encode(tokenize_weighted(pipeline.tokenizer, prompt)).embeds
        for prompt in ("a (bc:1) d", "a (bc:1.5) d")
    )
    assert plain.shape == weighted.shape
    changed = [place for place in range(plain.shape[1]) if not torch.equal(plain[0, place], weighted[0, place])]
    tokens = tokenize_weighted(pipeline.tokenizer, "a (bc:1.5) d")
    assert changed == [place for place, weight in enumerate(tokens.weights) if weight != 1]


@pytest.mark.parametrize("settings", DrawingSettings)
def test_a_negative_text_changes_the_picture_and_an_empty_one_does_not(
    pipeline: Pipeline, settings: DrawingSettings
) -> None:
    choice = SamplingChoice("euler", "simple", None, settings)
    ends = []
    for neg in (None, "", "x y"):
        negative = None if neg is None else pipeline.tokenize(neg, settings)
        embedding = pipeline.encode(pipeline.tokenize("a b", settings), negative)
        ends.append(_steps(pipeline, choice, embedding=embedding)[-1].latents)
    assert torch.equal(ends[0], ends[1])
    assert distance(ends[0], ends[2])[0] > 1e-3


def test_pixels_are_cut_off_and_not_rounded(pipeline: Pipeline) -> None:
    latents = _steps(pipeline, SamplingChoice("euler", "simple", None, COMFYUI))[-1].latents
    rounded, cut = (pipeline.decode(latents, 64, 64, settings).astype(int) for settings in DrawingSettings)
    difference = rounded - cut
    assert set(np.unique(difference)) == {0, 1}
    assert 0.2 < difference.mean() < 0.8
