"""Switching adapters in place: bit for bit what a cold build gives, in the same storage, and never more memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.domain.errors import JobCancelled, LoraIncompatible
from chromarpc_server.pipeline import PROFILES, Adapter, LoadContext, PreparedTransformer, read_adapter
from chromarpc_server.pipeline.adapters import reader
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.pipeline.adapters.conftest import Shapes, values
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

NAMES = ("aitk", "kohya_dora", "loha", "full_diff", "mixed_rank_alpha", "aitk_lokr_lowrank", "diffusers_peft")
MULTIPLIERS = (-1.0, 0.0, 0.3, 1.0, 2.0)
Set = list[tuple[int, float]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")


@pytest.fixture(scope="module")
def config(weights: dict[str, Tensor]) -> ChromaConfig:
    return ChromaConfig.from_shapes({name: t.shape for name, t in weights.items()}, _metadata())


def _metadata() -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors", "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def adapters(weights: dict[str, Tensor]) -> list[Adapter]:
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return [read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", shapes) for name in NAMES]


def _tensors(prepared: PreparedTransformer) -> Iterator[tuple[str, Tensor]]:
    yield from prepared.model.named_parameters()
    yield from prepared.model.named_buffers()


def _chosen(adapters: list[Adapter], chosen: Set) -> list[tuple[Adapter, float]]:
    return [(adapters[index], multiplier) for index, multiplier in chosen]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


SETS = st.lists(
    st.tuples(st.integers(0, len(NAMES) - 1), st.sampled_from(MULTIPLIERS)), max_size=3, unique_by=lambda p: p[0]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "profile", [one for one in PROFILES.values() if not one.trainer], ids=lambda profile: profile.name
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(st.tuples(SETS, st.none() | st.integers(0, 40)), min_size=2, max_size=6))
def test_any_sequence_of_switches_ends_where_a_cold_build_does(
    profile: object,
    dtype: torch.dtype,
    weights: dict[str, Tensor],
    config: ChromaConfig,
    adapters: list[Adapter],
    sequence: list[tuple[Set, int | None]],
) -> None:
    """Some switches are stopped half-way; the next one repairs what they left."""
    master = {name: tensor.to(dtype) for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in master.items()}
    prepared = PreparedTransformer(config, as_they_are(master), profile, DevicePlacement(CPU, dtype))  # type: ignore[arg-type]
    prepared.switch(())
    storage = {name: tensor.data_ptr() for name, tensor in _tensors(prepared)}
    for chosen, stop_after in sequence:
        calls = 0

        def check(limit: int | None = stop_after) -> None:
            nonlocal calls
            calls += 1
            if limit is not None and calls > limit:
                raise JobCancelled("stopped")

        try:
            prepared.switch(_chosen(adapters, chosen), LoadContext(check=check))
        except JobCancelled:
            continue
    last = _chosen(adapters, sequence[-1][0])
    prepared.switch(last)
    assert prepared.switch(last).rewritten_tensors == 0
    cold = PreparedTransformer(config, as_they_are(master), profile, DevicePlacement(CPU, dtype))  # type: ignore[arg-type]
    cold.switch(last)
    expected = dict(_tensors(cold))
    assert {name for name, _ in _tensors(prepared)} == set(expected)
    for name, tensor in _tensors(prepared):
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(_bits(tensor), _bits(expected[name])), name
        assert tensor.data_ptr() == storage[name], name
    assert all(torch.equal(master[name], tensor) for name, tensor in before.items())


def test_only_what_differs_is_rewritten(
    weights: dict[str, Tensor], config: ChromaConfig, adapters: list[Adapter]
) -> None:
    prepared = PreparedTransformer(
        config, as_they_are(weights), PROFILES["reference"], DevicePlacement(CPU, torch.float32)
    )
    assert prepared.switch(()).rewritten_tensors == len(weights)
    one, other = adapters[0], adapters[1]
    assert prepared.switch([(one, 1.0)]).rewritten_tensors == len(one.targets)
    assert prepared.switch([(one, 0.5)]).rewritten_tensors == len(one.targets)
    assert prepared.switch([(one, 0.5), (other, 0.0)]).rewritten_tensors == 0
    assert prepared.switch([(one, 0.5), (other, 1.0)]).rewritten_tensors == len(other.targets)
    assert prepared.switch(()).rewritten_tensors == len(one.targets | other.targets)


def test_a_change_that_overflows_is_refused_by_name_and_repaired(
    weights: dict[str, Tensor],
    config: ChromaConfig,
    adapters: list[Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(reader, "MAX_CHANGE", math.inf)  # reading would refuse it before
    save_file({"diffusion_model.img_in.diff": values(*weights["img_in.weight"].shape) + 3e38}, tmp_path / "a")
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    huge = read_adapter(tmp_path / "a", shapes)
    prepared = PreparedTransformer(
        config, as_they_are(weights), PROFILES["reference"], DevicePlacement(CPU, torch.float32)
    )
    prepared.switch(())
    good = {name: tensor.clone() for name, tensor in _tensors(prepared)}
    with pytest.raises(LoraIncompatible, match=r"overflows img_in\.weight"):
        prepared.switch([(huge, 2.0), (adapters[0], 1.0)])
    prepared.switch(())
    assert all(torch.equal(tensor, good[name]) for name, tensor in _tensors(prepared))


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_five_hundred_switches_take_no_more_memory_than_five(
    weights: dict[str, Tensor], config: ChromaConfig, adapters: list[Adapter]
) -> None:
    prepared = PreparedTransformer(
        config, as_they_are(weights), PROFILES["reference"], DevicePlacement(CPU, torch.float32)
    )
    sets = [[(adapters[0], 1.0)], [(adapters[1], 0.7), (adapters[2], 0.5)], []]
    held = {}
    for count in range(501):
        prepared.switch(sets[count % 3])
        if count in (5, 500):
            held[count] = _live_bytes()
    assert held[500] == held[5]
