"""What only a CUDA device can show. Run by hand: `make test-gpu`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chromarpc_server.verify import verify

pytestmark = pytest.mark.gpu


def test_verify_passes_and_exact_is_bit_identical_where_it_was_recorded(goldens: Path) -> None:
    out = io.StringIO()
    code = verify(goldens, device="cuda", as_json=True, out=out)
    report = json.loads(out.getvalue())
    assert code == 0, [case for case in report["cases"] if case["outcome"] == "FAIL"]
    exact = [case for case in report["cases"] if case["case"].endswith(" exact") and "pipeline/" in case["case"]]
    assert exact
    if torch.cuda.get_device_name() == "NVIDIA H100 80GB HBM3" and torch.__version__ == "2.11.0+cu130":
        recorded = [case for case in exact if case["case"].startswith("h100_bf16_float8")]
        assert all(case["tolerance"] == "exact" for case in recorded)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("hidden", "heads"), [(256, 4), (3072, 24)])
def test_kernels_give_what_plain_torch_gives(hidden: int, heads: int) -> None:
    from chromarpc_server.pipeline.fused import kernels, plain

    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    rows, head_dim = 7, hidden // heads
    x, added, gate, shift, scale = draw(rows, hidden), draw(rows, hidden), draw(hidden), draw(hidden), draw(hidden)
    gains = draw(2, head_dim)
    rope = draw(rows, head_dim // 2).float(), draw(rows, head_dim // 2).float()
    wide = draw(rows, 7 * hidden)

    def run(ops: object) -> list[torch.Tensor]:
        mine, both = x.clone(), wide.clone()
        found = [ops.norm_modulate(mine, shift, scale), ops.add_norm_modulate(mine, added, gate, shift, scale)]  # type: ignore[attr-defined]
        ops.gated_add(mine, added, gate)  # type: ignore[attr-defined]
        ops.qk_norm_rope(both[:, : 3 * hidden], gains[0], gains[1], rope, heads)  # type: ignore[attr-defined]
        mlp = both[:, 3 * hidden :]
        found += [mine, both, ops.join_gelu(added, mlp), ops.join_gelu(None, mlp)]  # type: ignore[attr-defined]
        pairs = [
            ops.norm_modulate_quantized(x, shift, scale),  # type: ignore[attr-defined]
            ops.add_norm_modulate_quantized(x.clone(), added, gate, shift, scale),  # type: ignore[attr-defined]
            ops.join_gelu_quantized(added, mlp),  # type: ignore[attr-defined]
            ops.join_gelu_quantized(None, mlp),  # type: ignore[attr-defined]
            ops.quantize(x),  # type: ignore[attr-defined]
        ]
        return found + [values.float() * step for values, step in pairs]

    for found, expected in zip(run(kernels), run(plain), strict=True):
        assert _relative(found, expected) < 1e-4


def test_kernels_round_weights_bit_for_bit() -> None:
    from chromarpc_server.pipeline.fused import kernels
    from chromarpc_server.pipeline.weights.quantization import dequantize_rows, quantize_rows

    weight = torch.randn(48, 3072, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-8, weight[2] * 1000
    q, scale = quantize_rows(weight)
    expected = dequantize_rows(q, scale)
    rounded, held, step = torch.empty_like(weight), torch.empty_like(q), torch.empty_like(scale)
    kernels.round_weight(weight, rounded)
    kernels.quantize_weight(weight, held, step)
    assert torch.equal(rounded.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(held.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(step, scale)
    assert torch.equal(kernels.dequantize(held, step, torch.empty_like(weight)), expected)


@pytest.mark.parametrize("profile", ["reference", "fp8"])
def test_a_recorded_step_gives_the_same_bits_and_follows_a_switch(profile: str) -> None:
    """And a held-in-float8 transformer gives those of a dequantized one."""
    from bench.switching import MINI, random_adapter, random_master
    from chromarpc_server.pipeline import PROFILES, PreparedTransformer
    from chromarpc_server.pipeline.placement import DevicePlacement
    from chromarpc_server.pipeline.weights.stored import as_they_are

    device = torch.device("cuda", 0)
    master = random_master(MINI, device)
    adapter = random_adapter(master, 4, 1)
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(256, 64, generator=generator, device=device).bfloat16()
    texts = [torch.randn(n, 128, generator=generator, device=device).bfloat16() for n in (11, 2)]

    def velocities(*, record: bool, hold: bool = False) -> list[torch.Tensor]:
        prepared = PreparedTransformer(
            MINI,
            as_they_are(master),
            PROFILES[profile],
            DevicePlacement(device, torch.bfloat16, hold_float8=hold, record_graphs=record),
        )
        found = []
        with torch.inference_mode():
            for adapters in ([], [(adapter, 1.0)]):
                prepared.switch(adapters)
                modulations = prepared.model.modulations(torch.tensor([0.7], device=device).bfloat16())[0]
                conditioning = prepared.run.fused.condition(texts, (16, 16))
                found += [prepared.run(latents, conditioning, modulations) for _ in range(3)]
        assert prepared.run.recorded_count == int(record)
        return found

    plain, recorded, held = velocities(record=False), velocities(record=True), velocities(record=True, hold=True)
    assert not torch.equal(plain[0], plain[-1])
    for one, other, third in zip(plain, recorded, held, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_the_probe_passes_on_a_device_that_works_and_finds_one_that_is_poisoned() -> None:
    from chromarpc_server.pipeline import probe_device

    probe_device(torch.device("cuda"))
    poisoned = (
        "import torch\n"
        "from chromarpc_server.domain.errors import DeviceLost\n"
        "from chromarpc_server.pipeline import probe_device\n"
        "try:\n"
        "    torch.zeros(4, device='cuda')[torch.tensor([10**6], device='cuda')].sum().item()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "try:\n"
        "    probe_device(torch.device('cuda'))\n"
        "except DeviceLost:\n"
        "    print('lost')\n"
    )
    ended = subprocess.run([sys.executable, "-c", poisoned], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1:] == ["lost"], ended.stdout + ended.stderr


def test_too_little_memory_is_told_as_such_and_what_was_held_is_freed() -> None:
    from chromarpc_server.pipeline import probe_device, release_memory, translate_memory_error

    device = torch.device("cuda")
    before = torch.cuda.memory_allocated(device)
    try:
        torch.empty(2**50, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        assert translate_memory_error(error) is not None
    else:
        raise AssertionError("a petabyte was allocated")
    release_memory(device)
    probe_device(device)
    assert torch.cuda.memory_allocated(device) == before


def test_a_card_without_a_byte_left_is_full_and_not_lost() -> None:
    from chromarpc_server.domain.errors import DeviceLost
    from chromarpc_server.pipeline import probe_device, release_memory

    device = torch.device("cuda")
    held: list[torch.Tensor] = []
    size = 2**34
    try:
        while size >= 512:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            probe_device(device)
            is_lost = False
        except DeviceLost:
            is_lost = True
    finally:
        held.clear()
        release_memory(device)
    assert not is_lost
    probe_device(device)


def test_files_are_staged_onto_the_device_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from chromarpc_server.pipeline.weights.safetensors_file import open_safetensors
    from chromarpc_server.pipeline.weights.staging import read_onto

    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{index}": torch.randn(3000, 3000 + index, generator=generator).bfloat16() for index in range(40)}
    save_file(tensors, tmp_path / "weights.safetensors")
    file = open_safetensors(tmp_path / "weights.safetensors")
    for name, tensor, _ in read_onto(file, torch.device("cuda")):
        assert torch.equal(tensor.cpu(), tensors[name])


def _autoencoder(dtype: torch.dtype) -> object:
    from bench.synthetic import FLUX_VAE, _parts, _random
    from chromarpc_server.pipeline.models.autoencoder import build_autoencoder

    device = torch.device("cuda")
    weights = dict(_random(_parts()[2], device, 3))
    for name, tensor in weights.items():  # norms and biases that are not ones and zeros
        if tensor.ndim == 1:
            weights[name] = tensor + 0.1 * torch.randn(tensor.shape, device=device).bfloat16()
    return build_autoencoder(FLUX_VAE, weights, device=device, dtype=dtype)


@pytest.mark.parametrize("channels", [24, 64, 512])
def test_decoder_kernels_give_what_plain_torch_gives(channels: int) -> None:
    from chromarpc_server.pipeline.fused import decoder_kernels, plain

    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    x, y = (draw(1, channels, 37, 29).contiguous(memory_format=torch.channels_last) for _ in range(2))
    bias, weight, shift = draw(channels), draw(channels), draw(channels)
    for given in (bias, None):
        for activates in (True, False):
            found = decoder_kernels.group_norm(x + 3, given, weight, shift, 8, 1e-6, activates=activates)
            expected = plain.group_norm(x + 3, given, weight, shift, 8, 1e-6, activates=activates)
            assert _relative(found, expected) < 3e-4
            assert found.is_contiguous(memory_format=torch.channels_last)
    doubled = decoder_kernels.double_size(x)
    assert torch.equal(doubled, plain.double_size(x))
    assert torch.equal(decoder_kernels.add_residual(x, y.clone(), bias), plain.add_residual(x, y.clone(), bias))


@torch.inference_mode()
def test_the_fused_decoder_is_as_close_to_float32_as_diffusers_and_always_the_same() -> None:
    from chromarpc_server.pipeline.fused.decoder import FusedDecoder, with_fused_decoder

    model = _autoencoder(torch.bfloat16)
    fused = with_fused_decoder(model)  # type: ignore[arg-type]
    assert isinstance(fused.decoder, FusedDecoder)
    latents = torch.randn(
        1, 16, 40, 24, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
    ).bfloat16()
    found = fused.decode(latents)[0]
    assert torch.equal(found, fused.decode(latents)[0])
    plain_found = model.decode(latents)[0]  # type: ignore[attr-defined]
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        truth = model.float().decode(latents.float())[0]  # type: ignore[attr-defined]
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    assert _relative(found, truth) <= 1.1 * _relative(plain_found, truth)


def test_steps_given_ahead_are_the_same_steps_and_a_stop_leaves_nothing_running() -> None:
    from collections.abc import Iterator

    from chromarpc_server.pipeline import DenoiseStep, finished_steps

    device = torch.device("cuda")
    weight = torch.randn(4096, 4096, device=device).bfloat16() / 64

    def steps(given: list[int]) -> Iterator[DenoiseStep]:
        latents = torch.ones(4096, 4096, device=device).bfloat16()
        for index in range(8):
            for _ in range(40):
                latents = latents @ weight
            given.append(index)
            yield DenoiseStep(index, 8, 1.0, 1000.0, (1.0, 0.0), latents, latents)

    given: list[int] = []
    ahead = []
    for step in finished_steps(steps(given), device, lambda _: None):
        ahead.append(len(given) - 1 - step.index)
        assert torch.cuda.current_stream(device).query() or ahead[-1] == 1
    assert ahead[0] == ahead[-1] == 0
    assert 1 in ahead, "no step was given ahead"
    assert max(ahead) == 1

    class Stopped(Exception):
        pass

    def stop(seconds: float) -> None:
        if len(given) == 4:
            raise Stopped

    given.clear()
    with pytest.raises(Stopped):
        for _ in finished_steps(steps(given), device, stop):
            pass
    assert given == [0, 1, 2, 3]
    assert torch.cuda.current_stream(device).query()


def test_shapes_recorded_ahead_give_the_bits_of_those_that_ran_first() -> None:
    from bench.switching import MINI, random_master
    from chromarpc_server.pipeline import PROFILES, PreparedTransformer
    from chromarpc_server.pipeline.placement import DevicePlacement
    from chromarpc_server.pipeline.weights.stored import as_they_are

    device = torch.device("cuda", 0)
    prepared = PreparedTransformer(
        MINI,
        as_they_are(random_master(MINI, device)),
        PROFILES["reference"],
        DevicePlacement(device, torch.bfloat16),
    )
    prepared.switch([])
    run = prepared.run
    if not run.records_ahead:
        pytest.skip("FlashAttention-3 is not installed: lengths are planned while they run")
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(256, 64, generator=generator, device=device).bfloat16()
    with torch.inference_mode():
        modulations = prepared.model.modulations(torch.tensor([0.7], device=device).bfloat16())[0]
        for length in (11, 50):
            texts = [torch.randn(n, 128, generator=generator, device=device).bfloat16() for n in (length, 2)]
            conditioning = run.fused.condition(texts, (16, 16))
            run.record(latents, conditioning, modulations)
            assert run.recorded_count == (0 if length == 11 else 2), "the first shape has to run"
            if length == 11:
                expected = run(latents, conditioning, modulations)
                assert torch.equal(run(latents, conditioning, modulations), expected)
            else:
                assert torch.equal(
                    run(latents, conditioning, modulations), run.fused(latents, conditioning, modulations)
                )


@pytest.mark.parametrize("rows", [1, 2, 34, 63, 64])
@pytest.mark.parametrize("width", [3072, 12288, 15360])
def test_a_float8_product_of_few_rows_is_what_plain_torch_gives(rows: int, width: int) -> None:
    from chromarpc_server.pipeline.fused import kernels

    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, width, device="cuda", generator=generator)
    weight = torch.randn(3072, width, device="cuda", generator=generator)
    bias = torch.randn(3072, device="cuda", dtype=torch.bfloat16, generator=generator)
    values, scale = kernels.quantize(x.to(torch.bfloat16))
    held, held_scale = kernels.quantize(weight.to(torch.bfloat16))
    expected = (values.float() * scale) @ (held.float() * held_scale).t() + bias.float()
    into = torch.empty(rows, 3072, device="cuda", dtype=torch.bfloat16)
    for out in (None, into):
        found = kernels.scaled_product(values, scale, held, held_scale.squeeze(1), bias, out)
        assert (found.float() - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(found, into)


@pytest.mark.parametrize("sampler", ["heun", "deis", "uni_pc"])
@pytest.mark.parametrize("settings", ["reference", "comfyui"])
def test_samplers_and_settings_draw_what_they_draw_on_a_cpu(
    tiny_checkpoint: Path, sampler: str, settings: str
) -> None:
    from chromarpc_server.domain.sampling_choices import DrawingSettings
    from chromarpc_server.pipeline import PROFILES, Checkpoint, CheckpointFiles, SamplingChoice, finished_steps

    files = CheckpointFiles(
        tiny_checkpoint / "chroma-mini.safetensors",
        tiny_checkpoint / "text_encoder_2",
        tiny_checkpoint / "tokenizer_2",
        tiny_checkpoint / "vae",
    )
    choice = SamplingChoice(sampler, "beta", 1.0, DrawingSettings(settings))
    ends = []
    for name, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        device = torch.device(name)
        checkpoint = Checkpoint.load(files, device=device, dtype=dtype)
        pipeline = checkpoint.prepare((), PROFILES["reference"], rounded=not choice.as_comfyui)
        embedding = pipeline.encode(pipeline.tokenize("a (b:1.2)", choice.settings))
        drawn = pipeline.denoise(
            embedding,
            width=64,
            height=96,
            steps=5,
            guidance_scale=3.0,
            seed=1,
            noise_draw="float32",
            choice=choice,
        )
        *_, last = finished_steps(drawn, device, lambda _: None)
        ends.append(last.latents.cpu())
    assert _relative(ends[1], ends[0]) < 0.05
