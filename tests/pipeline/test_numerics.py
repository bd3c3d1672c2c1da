"""What the numerics promise beyond the recorded vectors."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from chromarpc_server.domain.errors import JobCancelled, WeightsInvalid
from chromarpc_server.pipeline import PROFILES, SILENT, Checkpoint, CheckpointFiles, LoadContext, Pipeline
from chromarpc_server.pipeline.models import text_encoder
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.positions import key_attention_mask, rope_table
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.sampling import draw_noise, pack, unpack
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.other_parts import open_text_encoder
from chromarpc_server.pipeline.weights.quantization import (
    FLOAT8_MAX,
    SMALLEST_SCALE,
    dequantize_rows,
    quantize_rows,
)
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsError, open_safetensors
from chromarpc_server.pipeline.weights.shared import WeightFiles

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def _files(folder: Path) -> CheckpointFiles:
    return CheckpointFiles(
        folder / "chroma-mini.safetensors", folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae"
    )


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint.load(_files(folder), device=CPU, dtype=dtype)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    checkpoint = _load(tiny_checkpoint)
    return checkpoint.prepare((), PROFILES["reference"])


@pytest.fixture(scope="module")
def tiny(goldens: Path) -> ChromaTransformer:
    path = goldens / "cpu_fp32" / "transformer_tiny.safetensors"
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        config = ChromaConfig.from_shapes({k: tuple(v.shape) for k, v in weights.items()}, file.metadata())
    with torch.device("meta"):
        model = ChromaTransformer(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def _draw(pipeline: Pipeline, prompt: str, seed: int) -> list[torch.Tensor]:
    return [step.latents for step in _steps(pipeline, prompt, seed)]


def _steps(pipeline: Pipeline, prompt: str, seed: int):  # type: ignore[no-untyped-def]
    embedding = pipeline.encode(pipeline.tokenize(prompt))
    return pipeline.denoise(
        embedding, width=64, height=96, steps=3, guidance_scale=3.0, seed=seed, noise_draw="float32"
    )


def test_two_runs_that_interleave_are_the_runs_alone(pipeline: Pipeline) -> None:
    """Nothing on the pipeline changes between calls."""
    alone = [_draw(pipeline, "a", 1), _draw(pipeline, "b c", 2)]
    pairs = list(zip_longest(_steps(pipeline, "a", 1), _steps(pipeline, "b c", 2)))
    for index, (first, second) in enumerate(pairs):
        assert torch.equal(first.latents, alone[0][index])
        assert torch.equal(second.latents, alone[1][index])


def test_bfloat16_and_float32_draw_the_same_picture_but_for_rounding(tiny_checkpoint: Path) -> None:
    latents = []
    for dtype in (torch.float32, torch.bfloat16):
        prepared = _load(tiny_checkpoint, dtype).prepare((), PROFILES["reference"])
        latents.append(_draw(prepared, "a", 1)[-1].float())
    assert float((latents[0] - latents[1]).norm() / latents[0].norm()) < 0.05


def test_exact_and_reference_agree_in_float32(tiny_checkpoint: Path) -> None:
    checkpoint = _load(tiny_checkpoint)
    one, other = (_draw(checkpoint.prepare((), PROFILES[name]), "a b", 5)[-1] for name in ("exact", "reference"))
    assert float((one - other).norm() / one.norm()) < 1e-5


def test_loading_stops_where_it_is_told_to(tiny_checkpoint: Path) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        Checkpoint.load(_files(tiny_checkpoint), device=CPU, dtype=torch.float32, context=LoadContext(check=check))
    assert calls == 5


def test_a_module_on_meta_holds_nothing_and_takes_the_checkpoints_names(tiny: ChromaTransformer) -> None:
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        model = ChromaTransformer(tiny.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(model.state_dict()) == set(tiny.state_dict())


def test_modulations_of_all_steps_at_once_are_those_of_each(tiny: ChromaTransformer) -> None:
    timesteps = torch.tensor([1.0, 0.7, 0.1])
    batched = tiny.modulations(timesteps)
    each = torch.cat([tiny.modulations(timesteps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batched, each, rtol=1e-5, atol=1e-5)


def test_samples_of_a_batch_keep_to_their_own_masks(tiny: ChromaTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    img, txt = torch.randn(2, 6, 64, generator=generator), torch.randn(2, 8, 48, generator=generator)
    mask = torch.tensor([[1] * 3 + [0] * 5, [1] * 6 + [0] * 2])
    modulations = tiny.modulations(torch.tensor([0.5, 0.5]))
    rope = rope_table(tiny.config, 8, (2, 3), CPU)
    together = tiny(img, txt, modulations, rope, key_attention_mask(mask, 6))
    for index, kept in enumerate((4, 7)):
        own = slice(index, index + 1)
        rope = rope_table(tiny.config, kept, (2, 3), CPU)
        alone = tiny(img[own], txt[own, :kept], modulations[own], rope)
        torch.testing.assert_close(together[own], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["__x0__", "nerf_blocks.0.norm.scale"])
def test_other_models_are_refused_by_name(tiny: ChromaTransformer, key: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.state_dict().items()}
    with pytest.raises(WeightsInvalid, match="Radiance"):
        ChromaConfig.from_shapes({**shapes, key: (1,)})


@pytest.mark.parametrize("shape", [(2**40, 0), (2**20, 64)])
def test_tensors_of_nothing_make_no_model_of_any_size(tiny: ChromaTransformer, shape: tuple[int, int]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.state_dict().items()}
    with pytest.raises(WeightsInvalid, match="its layers have"):
        ChromaConfig.from_shapes({**shapes, "img_in.weight": shape})


def test_the_full_size_config_is_read_off_the_shapes() -> None:
    block = {"img_attn.norm.query_norm.scale": (128,), "img_mlp.0.weight": (12288, 3072)}
    shapes = {f"double_blocks.{i}.{name}": shape for i in range(19) for name, shape in block.items()}
    shapes |= {f"single_blocks.{i}.linear1.weight": (21504, 3072) for i in range(38)}
    shapes |= {f"distilled_guidance_layer.layers.{i}.in_layer.weight": (5120, 5120) for i in range(5)}
    shapes |= {
        "img_in.weight": (3072, 64), "txt_in.weight": (3072, 4096),
        "distilled_guidance_layer.in_proj.weight": (5120, 64),
    }  # fmt: skip
    config = ChromaConfig.from_shapes(shapes)
    assert (config.depth, config.depth_single_blocks, config.num_heads) == (19, 38, 24)
    assert config.modulation_slots == 344


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6))
def test_packing_and_unpacking_undo_each_other(rows: int, columns: int) -> None:
    latents = torch.arange(16 * rows * columns * 4, dtype=torch.float32).reshape(1, 16, rows * 2, columns * 2)
    assert torch.equal(unpack(pack(latents), columns * 16, rows * 16), latents)


def test_a_seed_is_one_picture_per_draw() -> None:
    noise = draw_noise(64, 64, 7, torch.bfloat16, "legacy")
    assert torch.equal(noise, draw_noise(64, 64, 7, torch.bfloat16, "legacy"))
    assert not torch.equal(noise, draw_noise(64, 64, 7, torch.bfloat16, "float32"))
    assert abs(float(noise.float().std()) - 1) < 0.1


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.floats(1e-20, 1e4))
def test_quantized_rows_are_bounded_and_near(seed: int, spread: float) -> None:
    weight = (torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16()
    weight[0] = 0
    q, scale = quantize_rows(weight)
    assert float(q.float().abs().max()) <= FLOAT8_MAX
    assert float(scale[0]) == SMALLEST_SCALE
    assert not dequantize_rows(q, scale)[0].any()
    if spread > 1e-3:
        error = (dequantize_rows(q, scale).float() - weight.float()).norm() / weight.float().norm()
        assert float(error) < 0.06


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_only_one_error_comes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file.safetensors"
    path.write_bytes(data)
    try:
        file = open_safetensors(path)
        list(file.read())
    except SafetensorsError as error:
        assert str(path) not in str(error)


def test_the_tokenizer_pads_truncates_and_counts_what_it_cut(pipeline: Pipeline) -> None:
    empty = pipeline.tokenize("")
    assert empty.ids[0, 0] == 1
    assert not empty.ids[0, 1:].any()
    assert (empty.token_count, empty.cut_count) == (1, 0)
    long = pipeline.tokenize("a" * 65_536)
    assert long.ids.shape == (1, 512)
    assert long.ids[0, -1] == 1
    assert long.token_count == 512
    assert long.cut_count > 60_000


def test_a_preview_is_small_and_follows_the_latents(pipeline: Pipeline) -> None:
    *_, last = _steps(pipeline, "a", 1)
    assert pipeline.preview(last, 64, 96, 512).shape == (12, 8, 3)
    assert pipeline.preview(last, 64, 96, 6).shape == (6, 4, 3)


@pytest.mark.parametrize("host", [False, True])
def test_a_text_encoder_held_in_float8_gives_the_same_bits(tiny_checkpoint: Path, host: bool) -> None:
    """Wherever its layers stay, and call after call."""
    folder = tiny_checkpoint / "text_encoder_2"
    ids = torch.randint(2, 60, (1, 512), generator=torch.Generator().manual_seed(1))

    def build(**options: bool) -> torch.nn.Module:
        opened = open_text_encoder(folder, WeightFiles())
        return text_encoder.build_text_encoder(
            text_encoder.text_encoder_config(opened.config),
            ReadingProgress((opened.part,), SILENT).stored(opened.part),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            quantize=True,
            **options,
        )

    wide = text_encoder.encode(build(), ids)
    held = build(hold_float8=True, keep_in_host_memory=host)
    assert torch.equal(text_encoder.encode(held, ids), wide)
    assert torch.equal(text_encoder.encode(held, ids), wide)
    kept = sum(tensor.nbytes for tensor in held.state_dict().values())
    assert kept < 0.8 * sum(tensor.nbytes for tensor in build().state_dict().values())
