"""Two devices that draw one image, a pass of guidance each; here a CPU twice."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chromarpc_server.domain.errors import JobCancelled, LoraIncompatible
from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    CheckpointFiles,
    LoadContext,
    LoadProgress,
    Pipeline,
    TransformerPair,
    finished_steps,
    read_adapter,
)
from chromarpc_server.verify import float32_cases, verify
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SEPARATE = ("exact", "preview-exact")
"""Profiles that make one pass after the other."""
PACKED = ("reference", "fp8", "preview")
"""Profiles that pack both passes on one device."""


def _load(folder: Path, second: torch.device | None) -> Checkpoint:
    files = CheckpointFiles(
        folder / "chroma-mini.safetensors", folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae"
    )
    return Checkpoint.load(files, device=CPU, dtype=torch.float32, second=second)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def single(tiny_checkpoint: Path) -> Checkpoint:
    return _load(tiny_checkpoint, None)


@pytest.fixture(scope="module")
def paired(tiny_checkpoint: Path) -> Checkpoint:
    return _load(tiny_checkpoint, CPU)


@pytest.fixture(scope="module")
def adapters(single: Checkpoint) -> list[Adapter]:
    return [
        read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", single.targets) for name in ("aitk", "kohya")
    ]


def _steps(pipeline: Pipeline, guidance: float = 3.0) -> list[Tensor]:
    """Latents after each step."""
    embedding = pipeline.encode(pipeline.tokenize("a b c"), pipeline.tokenize("d"))
    steps = pipeline.denoise(
        embedding, width=64, height=96, steps=3, guidance_scale=guidance, seed=1, noise_draw="float32"
    )
    return [step.latents for step in steps]


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(mine, others) for mine, others in zip(one, other, strict=True))


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float((one[-1] - other[-1]).norm() / other[-1].norm())


def _counted(transformer: Any) -> list[int]:
    """Counts the texts that each call for velocities names."""
    calls: list[int] = []
    made = transformer.velocity

    def velocity(texts: Sequence[Any], *rest: Any) -> Any:
        calls.append(len(texts))
        return made(texts, *rest)

    transformer.velocity = velocity
    return calls


@pytest.mark.parametrize("profile", SEPARATE)
def test_a_pair_draws_the_bits_of_one_device_where_passes_are_made_one_by_one(
    profile: str, single: Checkpoint, paired: Checkpoint, adapters: list[Adapter]
) -> None:
    wanted = [(adapters[0], 0.7)]
    one, two = (checkpoint.prepare(wanted, PROFILES[profile]) for checkpoint in (single, paired))
    assert isinstance(two.transformer, TransformerPair)
    expected, found = _steps(one), _steps(two)
    assert _equal(found, expected)
    assert (two.decode(found[-1], 64, 96) == one.decode(expected[-1], 64, 96)).all()


@pytest.mark.parametrize("profile", PACKED)
def test_a_pair_differs_by_rounding_where_passes_are_packed_and_always_draws_the_same(
    profile: str, single: Checkpoint, paired: Checkpoint, adapters: list[Adapter]
) -> None:
    wanted = [(adapters[0], 0.7)]
    two = paired.prepare(wanted, PROFILES[profile])
    found = _steps(two)
    assert _equal(_steps(two), found)
    assert _equal(_steps(paired.prepare(wanted, PROFILES[profile])), found)
    expected = _steps(single.prepare(wanted, PROFILES[profile]))
    if profile == "fp8":
        # What another order of sums moves over the edge of a step in float8 is rounded the other way.
        truth = _steps(single.prepare(wanted, PROFILES["reference"]))
        assert _apart(found, truth) < 1.1 * _apart(expected, truth)
    else:
        assert _apart(found, expected) < 1e-5


def test_a_pair_passes_by_the_recorded_vectors(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = float32_cases.prepare_transformer

    def doubled(*given: Any, **named: Any) -> TransformerPair:
        return TransformerPair(made(*given, **named), made(*given, **named), CPU)

    monkeypatch.setattr(float32_cases, "prepare_transformer", doubled)
    folder = tmp_path / "cpu_fp32"
    folder.mkdir()
    for name in ("pipeline_fp32.safetensors", "transformer_tiny.safetensors"):
        (folder / name).symlink_to(goldens / "cpu_fp32" / name)
    out = io.StringIO()
    code = verify(tmp_path, device="cpu", as_json=True, out=out)
    cases = [case for case in json.loads(out.getvalue())["cases"] if "pipeline_fp32" in case["case"]]
    assert code == 0, [case for case in cases if case["outcome"] == "FAIL"]
    assert sum(case["outcome"] == "PASS" for case in cases) >= 8


@pytest.mark.parametrize("profile", PROFILES)
def test_each_device_makes_one_pass(profile: str, paired: Checkpoint) -> None:
    pipeline = paired.prepare((), PROFILES[profile])
    pair = pipeline.transformer
    assert isinstance(pair, TransformerPair)
    assert pair.first is not pair.second
    calls = [_counted(transformer) for transformer in (pair.first, pair.second)]
    _steps(pipeline)
    assert calls == [[1], [1]]


@pytest.mark.parametrize("profile", PROFILES)
def test_without_guidance_the_second_device_has_no_part_and_the_bits_are_those_of_one(
    profile: str, single: Checkpoint, paired: Checkpoint
) -> None:
    pipeline = paired.prepare((), PROFILES[profile])
    calls = _counted(pipeline.transformer.second)  # type: ignore[attr-defined]
    assert _equal(_steps(pipeline, 1.0), _steps(single.prepare((), PROFILES[profile]), 1.0))
    assert calls == []


@pytest.mark.parametrize("profile", PROFILES)
def test_adapters_are_switched_on_both(profile: str, paired: Checkpoint, adapters: list[Adapter]) -> None:
    one, other = [(adapters[0], 0.7)], [(adapters[1], -0.4)]
    pipeline = paired.prepare(one, PROFILES[profile])
    first = _steps(pipeline)
    pipeline.transformer.switch(other)
    second = _steps(pipeline)
    assert not _equal(second, first)
    assert _equal(second, _steps(paired.prepare(other, PROFILES[profile])))
    assert pipeline.transformer.switch(other).rewritten_tensors == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_a_switch_that_ends_between_the_two_is_repaired_by_the_next(
    profile: str, paired: Checkpoint, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = [(adapters[0], 0.7)], [(adapters[1], -0.4)]
    pipeline = paired.prepare(one, PROFILES[profile])
    pair = pipeline.transformer
    assert isinstance(pair, TransformerPair)
    expected = _steps(pipeline)

    def stop(*_: Any) -> Any:
        raise JobCancelled("enough")

    with monkeypatch.context() as patched:
        patched.setattr(pair.first, "switch", stop)
        with pytest.raises(JobCancelled):
            pair.switch(other)
    assert pair.second.switch(other).rewritten_tensors == 0, "the second had been switched"
    pair.switch(one)
    assert _equal(_steps(pipeline), expected)


def test_the_second_device_is_given_its_pass_before_the_first_ones(paired: Checkpoint) -> None:
    """Both compute then; what comes back is copied once the first one has its own."""
    pipeline = paired.prepare((), PROFILES["reference"])
    pair = pipeline.transformer
    assert isinstance(pair, TransformerPair)
    given: list[str] = []

    def noted(transformer: Any, name: str) -> None:
        made = transformer.velocity

        def velocity(*arguments: Any) -> Any:
            computes = made(*arguments)
            return lambda *step: (given.append(name), computes(*step))[1]

        transformer.velocity = velocity

    noted(pair.first, "first")
    noted(pair.second, "second")
    _steps(pipeline)
    assert given == ["second", "first"] * 3


def test_what_either_device_does_without_is_told(paired: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = paired.prepare((), PROFILES["reference"])
    transformer: Any = pipeline.transformer
    assert pipeline.fallbacks == ()
    kernels = DeviceFallback(Part.KERNELS, "they do not compile")
    graphs = DeviceFallback(Part.STEP_GRAPHS, "it fails here")
    monkeypatch.setattr("chromarpc_server.pipeline.pair.kernels_fallback", lambda _: kernels)
    transformer.first.run.fallback = transformer.second.run.fallback = graphs
    assert pipeline.fallbacks == (graphs, kernels)


@pytest.fixture
def helper() -> Iterator[Executor]:
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor


@pytest.mark.parametrize("profile", ["exact", "reference", "preview"])
def test_work_that_another_thread_gives_the_second_device_draws_the_same(
    profile: str, paired: Checkpoint, adapters: list[Adapter], helper: Executor
) -> None:
    wanted = [(adapters[0], 0.7)]
    pipeline = paired.prepare(wanted, PROFILES[profile])
    told: list[LoadProgress] = []
    first, second = (paired.allocate(PROFILES[profile]).first for _ in range(2))  # type: ignore[attr-defined]
    pair = TransformerPair(first, second, CPU, helper)
    pair.switch(wanted, LoadContext(progress=told.append))
    whole = 2 * sum(tensor.nbytes for tensor in paired.master.values())
    assert (told[-1].done_bytes, told[-1].total_bytes) == (whole, whole)
    with_helper = replace(pipeline, transformer=pair, dtype=torch.bfloat16)
    alone = replace(pipeline, dtype=torch.bfloat16)
    assert _equal(_steps(with_helper), _steps(alone))


def test_what_fails_in_either_thread_ends_both(paired: Checkpoint, helper: Executor) -> None:
    first, second = (paired.allocate(PROFILES["exact"]).first for _ in range(2))  # type: ignore[attr-defined]
    pair = TransformerPair(first, second, CPU, helper)
    calls = []

    def check() -> None:
        calls.append(threading.current_thread())
        if len(calls) == 9:
            raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        pair.switch((), LoadContext(check=check))
    count = len(calls)
    assert len(set(calls)) == 2
    pair.switch(())
    assert len(calls) == count, "nothing of the first switch went on"


def test_an_adapter_that_overflows_leaves_both_usable(paired: Checkpoint, adapters: list[Adapter]) -> None:
    pipeline = paired.prepare((), PROFILES["reference"])
    expected = _steps(pipeline)
    with pytest.raises(LoraIncompatible):
        pipeline.transformer.switch([(adapters[0], 1e39)])
    pipeline.transformer.switch(())
    assert _equal(_steps(pipeline), expected)


@pytest.mark.parametrize("after", [0, 5, 60])
def test_a_switch_is_stopped_in_either_half(after: int, paired: Checkpoint, adapters: list[Adapter]) -> None:
    transformer = paired.allocate(PROFILES["reference"])
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        transformer.switch([(adapters[0], 0.7)], LoadContext(check=check))
    assert calls == after + 1


def test_progress_runs_over_both_halves(paired: Checkpoint) -> None:
    told: list[LoadProgress] = []
    transformer = paired.allocate(PROFILES["reference"])
    transformer.switch((), LoadContext(progress=told.append))
    done = [progress.done_bytes for progress in told]
    assert done == sorted(done)
    assert len(set(done)) == len(done)
    assert {progress.total_bytes for progress in told} == {done[-1]}


def test_a_stop_between_steps_ends_both(paired: Checkpoint) -> None:
    pipeline = paired.prepare((), PROFILES["reference"])
    given: list[int] = []
    pauses: list[float] = []

    def stop(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise JobCancelled("enough")

    embedding = pipeline.encode(pipeline.tokenize("a"))
    steps = pipeline.denoise(
        embedding, width=64, height=64, steps=9, guidance_scale=3.0, seed=1, noise_draw="float32"
    )
    with pytest.raises(JobCancelled):
        given.extend(step.index for step in finished_steps(steps, CPU, stop))
    assert given == [0, 1]


def test_a_pair_takes_of_each_device_what_one_takes(
    single: Checkpoint, paired: Checkpoint, adapters: list[Adapter]
) -> None:
    for profile in PROFILES.values():
        one, two = (checkpoint.allocate(profile) for checkpoint in (single, paired))
        wanted = [(adapters[0], 0.7)]
        assert two.growth_bytes(wanted) == one.growth_bytes(wanted)
        for transformer in (one, two):
            transformer.switch(wanted)
        assert two.size_bytes == one.size_bytes > 0
        assert paired.prepared_bytes(profile) == single.prepared_bytes(profile)
