"""The fused forward is the plain one's function: packed, padded, with one sequence or two, from float8 or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.pipeline import PROFILES, PreparedTransformer
from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.fused.attention import SDPA, Attention, Spans, select_attention
from chromarpc_server.pipeline.fused.forward import FusedTransformer
from chromarpc_server.pipeline.fused.layout import Layout
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.positions import rope_table
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.weights.quantization import dequantize_rows, quantize_rows
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.tiny_checkpoint import GOLDENS

CPU = torch.device("cpu")
GRID = (4, 6)
TOKENS = GRID[0] * GRID[1]
TINY = GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(TINY)


@pytest.fixture(scope="module")
def config(weights: dict[str, Tensor]) -> ChromaConfig:
    with safe_open(TINY, "pt") as file:
        return ChromaConfig.from_shapes({name: t.shape for name, t in weights.items()}, dict(file.metadata()))


def _prepare(
    config: ChromaConfig,
    weights: dict[str, Tensor],
    profile: str,
    dtype: torch.dtype,
    *,
    hold_float8: bool = False,
) -> PreparedTransformer:
    stored = {name: tensor.bfloat16() for name, tensor in weights.items()}
    prepared = PreparedTransformer(
        config, as_they_are(stored), PROFILES[profile], DevicePlacement(CPU, dtype, hold_float8=hold_float8)
    )
    prepared.switch([])
    return prepared


def _inputs(config: ChromaConfig, dtype: torch.dtype, lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(TOKENS, config.in_channels, generator=generator).to(dtype)
    texts = [torch.randn(length, config.context_in_dim, generator=generator).to(dtype) for length in lengths]
    return latents, texts


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _run(prepared: PreparedTransformer, latents: Tensor, texts: list[Tensor], multiple: int = 1) -> Tensor:
    """Velocities, with the first text's rows rounded up to a multiple as on a GPU."""
    with torch.inference_mode():
        modulations = prepared.model.modulations(torch.tensor([0.7], dtype=latents.dtype))[0]
        padding = Attention("padded", SDPA.kernel, any_length=multiple > 1)
        fused = FusedTransformer(
            prepared.model, float8_products=prepared.profile.float8_products, attention=padding
        )
        return fused(latents, fused.condition(texts, GRID), modulations)


def _plain(prepared: PreparedTransformer, latents: Tensor, text: Tensor) -> Tensor:
    model = prepared.model
    with torch.inference_mode():
        modulations = model.modulations(torch.tensor([0.7], dtype=latents.dtype))
        rope = rope_table(model.config, len(text), GRID, CPU)
        return model(latents[None], text[None], modulations, rope)[0]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("lengths", [(11, 2), (2, 2), (32, 2), (33,), (1,)])
def test_packed_sequences_give_what_each_alone_gives(
    config: ChromaConfig, weights: dict[str, Tensor], lengths: tuple[int, ...], multiple: int
) -> None:
    prepared = _prepare(config, weights, "reference", torch.float32)
    latents, texts = _inputs(config, torch.float32, lengths)
    found = _run(prepared, latents, texts, multiple)
    assert found.shape == (len(texts), TOKENS, config.in_channels)
    for index, text in enumerate(texts):
        assert _relative(found[index], _plain(prepared, latents, text)) < 1e-5


@pytest.mark.slow
def test_in_bf16_it_is_as_close_to_the_truth_as_the_plain_forward(
    config: ChromaConfig, weights: dict[str, Tensor]
) -> None:
    truth_of = _prepare(config, weights, "reference", torch.float32)
    prepared = _prepare(config, weights, "reference", torch.bfloat16)
    latents, texts = _inputs(config, torch.bfloat16, (11, 2))
    truth = _plain(truth_of, latents.float(), texts[0].float())
    fused = _relative(_run(prepared, latents, texts)[0], truth)
    assert fused <= 1.1 * _relative(_plain(prepared, latents, texts[0]), truth)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_held_in_float8_give_the_same_bits(
    config: ChromaConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> None:
    latents, texts = _inputs(config, dtype, (11, 2))
    held = _prepare(config, weights, "reference", dtype, hold_float8=True)
    wide = _prepare(config, weights, "reference", dtype)
    assert held.size_bytes < 0.75 * wide.size_bytes
    assert torch.equal(_run(held, latents, texts), _run(wide, latents, texts))


@pytest.mark.slow
def test_float8_products_cost_what_their_rounding_costs(config: ChromaConfig, weights: dict[str, Tensor]) -> None:
    latents, texts = _inputs(config, torch.float32, (11, 2))
    exact = _run(_prepare(config, weights, "reference", torch.float32), latents, texts)
    rounded = _run(_prepare(config, weights, "fp8", torch.float32), latents, texts)
    # Float8 has 3 bits of mantissa: each value is off by about 2.6 %, and sums of many average that out.
    assert 1e-3 < _relative(rounded, exact) < 0.1


def test_unused_rows_and_other_prompts_leave_a_sequence_alone(
    config: ChromaConfig, weights: dict[str, Tensor]
) -> None:
    prepared = _prepare(config, weights, "reference", torch.float32)
    latents, texts = _inputs(config, torch.float32, (11, 2))
    alone = _run(prepared, latents, texts, 32)
    other = [texts[0] * 3, texts[1]]
    assert torch.equal(_run(prepared, latents, other, 32)[1], alone[1])


@pytest.mark.parametrize("lengths", [(5,), (5, 2), (32, 2)])
def test_a_layout_says_where_everything_is(lengths: tuple[int, ...]) -> None:
    layout = Layout.of(lengths, 10, multiple=32)
    assert layout.rows == 32 + sum(lengths[1:]) + 10 * len(lengths)
    seen = torch.zeros(layout.rows, dtype=torch.int64)
    for rows in (layout.image, *layout.texts):
        seen[rows] += 1
    assert bool((seen == 1).all())
    spans = layout.spans(CPU)
    sizes = [end - begin for begin, end in zip(spans.bounds[:-1], spans.bounds[1:], strict=True)]
    assert sizes == [count + 10 for count in lengths]
    assert spans.starts.tolist() == list(spans.bounds)
    assert spans.longest >= max(sizes)
    assert layout.shape == Layout.of((1, *lengths[1:]), 10, multiple=32).shape


def test_attention_on_a_cpu_is_torchs_own() -> None:
    assert select_attention(CPU, torch.float32, 64) is SDPA


def test_attention_of_one_sequence_does_not_see_another() -> None:
    qkv = torch.randn(9, 3 * 2 * 4, generator=torch.Generator().manual_seed(1))
    spans = Spans((1, 5, 9), torch.tensor([1, 5, 9]), 4)
    both = SDPA(qkv, 2, spans)[1:]
    qkv[5:] = 7
    assert torch.equal(SDPA(qkv, 2, spans)[1:5], both[:4])


def test_quantized_activations_keep_their_largest_value() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    x[2] = 0
    values, scale = plain.quantize(x)
    assert scale.shape == (4, 1)
    back = values.float() * scale
    assert torch.allclose(back.abs().amax(dim=1), x.abs().amax(dim=1))
    assert _relative(back, x) < 0.04
    assert bool((back[2] == 0).all())


def test_dequantizing_gives_the_reference_weights() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, scale = quantize_rows(weight)
    expected = dequantize_rows(q, scale)
    assert torch.equal(plain.dequantize(q, scale, torch.empty_like(weight)), expected)
    assert torch.equal(plain.dequantize(q, scale, torch.empty(6, 32)), expected.float())


def test_what_a_step_is_given_stays_as_it_was(config: ChromaConfig, weights: dict[str, Tensor]) -> None:
    """Streams are added to in place; inputs are used again in the next step."""
    prepared = _prepare(config, weights, "reference", torch.float32)
    latents, texts = _inputs(config, torch.float32, (11, 2))
    with torch.inference_mode():
        modulations = prepared.model.modulations(torch.tensor([0.7]))[0]
        conditioning = prepared.run.fused.condition(texts, GRID)
        before = replace(conditioning, texts=conditioning.texts.clone())
        kept = latents.clone()
        first = prepared.run(latents, conditioning, modulations)
        assert torch.equal(conditioning.texts, before.texts)
        assert torch.equal(latents, kept)
        assert torch.equal(prepared.run(latents, conditioning, modulations), first)
