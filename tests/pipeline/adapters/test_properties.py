"""What holds for every adapter: zero is the base, order and slices mean what they say."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.pipeline.adapters import Adapter, read_adapter
from tests.pipeline.adapters.conftest import rel, values
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

BASE = load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
TARGETS = {name: tuple(tensor.shape) for name, tensor in BASE.items()}
RECORDED = {
    path.stem: read_adapter(path, TARGETS)
    for path in sorted((GOLDENS / "adapters").glob("*.safetensors"))
    if ".expected" not in path.name
}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
MULTIPLIERS = st.floats(-2, 2, allow_nan=False)


def _read(tensors: Mapping[str, Tensor]) -> Adapter:
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(tensors), Path(folder) / "adapter.safetensors")
        return read_adapter(Path(folder) / "adapter.safetensors", TARGETS)


@given(name=st.sampled_from(sorted(RECORDED)), dtype=DTYPES)
@settings(deadline=None)
def test_at_zero_the_base_keeps_its_bits(name: str, dtype: torch.dtype) -> None:
    adapter = RECORDED[name]
    for parameter in BASE:
        weight = BASE[parameter].to(dtype)
        for zero in (0.0, -0.0):
            assert torch.equal(adapter.apply(parameter, weight, zero), weight)


@given(name=st.sampled_from(sorted(RECORDED)), dtype=DTYPES, multiplier=MULTIPLIERS)
@settings(deadline=None, max_examples=60)
def test_applying_is_pure_and_repeatable(name: str, dtype: torch.dtype, multiplier: float) -> None:
    adapter = RECORDED[name]
    for parameter in adapter.targets:
        weight = BASE[parameter].to(dtype)
        before = weight.clone()
        once, twice = (adapter.apply(parameter, weight, multiplier) for _ in range(2))
        assert torch.equal(once, twice)
        assert torch.equal(weight, before)
        assert (once.dtype, once.shape) == (weight.dtype, weight.shape)


@given(name=st.sampled_from(sorted(RECORDED)), multiplier=MULTIPLIERS)
@settings(deadline=None, max_examples=40)
def test_into_bf16_is_one_rounding_or_the_references_three(name: str, multiplier: float) -> None:
    adapter = RECORDED[name]
    for parameter in adapter.targets:
        weight = BASE[parameter].bfloat16()
        found = adapter.apply(parameter, weight, multiplier)
        exact = adapter.apply(parameter, weight.float(), multiplier)
        if "LoRA" in adapter.format:
            change = (exact - weight.float()).norm()
            assert (found.float() - exact).norm() <= 2**-8 * (exact.norm() + 2 * change)
        else:
            assert torch.equal(found, exact.bfloat16())


@given(names=st.lists(st.sampled_from(sorted(RECORDED)), min_size=2, max_size=4), multiplier=MULTIPLIERS)
@settings(deadline=None, max_examples=30)
def test_several_are_applied_in_order_each_on_what_was_left(names: list[str], multiplier: float) -> None:
    for parameter in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.2.linear2.weight"):
        weight = BASE[parameter]
        for name in names:
            weight = RECORDED[name].apply(parameter, weight, multiplier)
        additive = [name for name in names if "DoRA" not in RECORDED[name].format]
        if len(additive) == len(names):
            total = sum(
                (RECORDED[n].apply(parameter, BASE[parameter], multiplier) - BASE[parameter]) for n in names
            )
            assert torch.allclose(weight, BASE[parameter] + total, atol=1e-4)


@given(
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    present=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    single=st.booleans(),
    dtype=DTYPES,
    multiplier=MULTIPLIERS,
)
@settings(deadline=None, max_examples=60)
def test_split_rows_equal_the_fused_weight(
    ranks: list[int], present: list[bool], *, single: bool, dtype: torch.dtype, multiplier: float
) -> None:
    native = "single_blocks.1.linear1" if single else "double_blocks.1.img_attn.qkv"
    names = ["attn.to_q", "attn.to_k", "attn.to_v"] + (["proj_mlp"] if single else [])
    block = "transformer.single_transformer_blocks.1" if single else "transformer.transformer_blocks.1"
    if not any(present[: len(names)]):
        return
    split: dict[str, Tensor] = {}
    ups, downs, start = [], [], 0
    out = TARGETS[f"{native}.weight"][0]
    for index, name in enumerate(names):
        rows = out - start if name == "proj_mlp" else 64
        if present[index]:
            down, up = values(ranks[index], 64, seed=index), values(rows, ranks[index], seed=index + 9)
            split |= {f"{block}.{name}.lora_A.weight": down, f"{block}.{name}.lora_B.weight": up}
            downs.append(down)
            placed = torch.zeros(out, ranks[index])
            placed[start : start + rows] = up
            ups.append(placed)
        start += rows
    fused = {
        f"diffusion_model.{native}.lora_A.weight": torch.cat(downs),
        f"diffusion_model.{native}.lora_B.weight": torch.cat(ups, dim=1),
    }
    weight = BASE[f"{native}.weight"].to(dtype)
    apart, together = (_read(tensors).apply(f"{native}.weight", weight, multiplier) for tensors in (split, fused))
    if dtype == torch.float32:
        assert rel(apart, together) < 1e-6
    else:
        # Sums ordered otherwise may tip a rounding, of a few elements, by one step.
        assert (apart != together).float().mean() < 0.01
        assert rel(apart, together) < 2**-9


def test_rows_without_a_part_keep_their_bits() -> None:
    adapter = RECORDED["diffusers_peft"]
    weight = BASE["single_blocks.0.linear1.weight"].bfloat16()
    changed = adapter.apply("single_blocks.0.linear1.weight", weight, 1.0)
    assert torch.equal(changed[64:128], weight[64:128])  # k was not trained
    for rows in (slice(0, 64), slice(128, 192), slice(192, 448)):
        assert not torch.equal(changed[rows], weight[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_layer_has_its_own_rank_and_any_float_dtype_will_do(dtype: torch.dtype) -> None:
    adapter = _read(
        {
            key: values(*shape, seed=seed, dtype=dtype)
            for seed, (key, shape) in enumerate(
                {
                    "diffusion_model.img_in.lora_A.weight": (3, 64),
                    "diffusion_model.img_in.lora_B.weight": (64, 3),
                    "diffusion_model.txt_in.lora_A.weight": (7, 48),
                    "diffusion_model.txt_in.lora_B.weight": (64, 7),
                }.items()
            )
        }
    )
    assert adapter.ranks == (3, 7)
    assert adapter.rank == 7
    assert adapter.apply("txt_in.weight", BASE["txt_in.weight"], 1.0).dtype == torch.float32
