"""`cpu_fp32`: vectors recorded on a CPU in float32."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.adapters import read_adapter
from chromarpc_server.pipeline.denoising import denoise_from
from chromarpc_server.pipeline.fused.decoder import fuse
from chromarpc_server.pipeline.merged_transformer import prepare_transformer
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.positions import dense_attention_mask, key_attention_mask, rope_table
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import PROFILES
from chromarpc_server.pipeline.weights.quantization import dequantize_rows, quantize_rows
from chromarpc_server.verify.report import (
    Outcome,
    Reporter,
    Result,
    identical,
    skipped,
    within,
    within_abs,
)
from chromarpc_server.verify.vectors import Vectors

CPU = torch.device("cpu")
GROUP = "cpu_fp32"


def run(folder: Path, reporter: Reporter) -> None:
    """Every case of the folder. Float32 on a CPU, whatever device the rest is verified on."""
    checks = {
        "transformer_forward.safetensors": _forward,
        "schedule.json": _schedule,
        "noise_packed.safetensors": _noise,
        "noise_packed_legacy.safetensors": _noise,
        "pipeline_fp32.safetensors": _pipeline,
        "t5_embeds.safetensors": _text,
        "lora_merge_float8.safetensors": _merge,
    }
    for name, check in checks.items():
        path = folder / name
        if path.is_file():
            reporter.guarded(f"{GROUP}/{path.stem}", lambda check=check, path=path: check(path, reporter))  # type: ignore[misc]


def _needs(path: Path, name: str, reporter: Reporter) -> Vectors | None:
    beside = path.with_name(name)
    if beside.is_file():
        return Vectors.read(beside)
    reporter.add(skipped(f"{GROUP}/{path.stem}", f"{name} is not there"))
    return None


def _forward(path: Path, reporter: Reporter) -> None:
    weights = _needs(path, "transformer_tiny.safetensors", reporter)
    if weights is None:
        return
    vectors = Vectors.read(path)
    prepared = prepare_transformer(
        weights.chroma_config(),
        weights.tensors,
        (),
        PROFILES["reference"],
        DevicePlacement(CPU, torch.float32),
        quantize=False,
    )
    model = prepared.model
    for number in vectors.cases():
        case = vectors.of(number)
        rows, columns = (int(side) for side in case["grid"])
        text, mask = case["txt"], case["txt_mask"]
        kept = int(mask.sum()) + 1
        with torch.inference_mode():
            modulations = model.modulations(case["timestep"])
            variants = {
                "masked": (text, dense_attention_mask(mask, rows * columns, model.config.num_heads)),
                "keys masked": (text, key_attention_mask(mask, rows * columns)),
                "sliced": (text[:, :kept], None),
            }
            for name, (txt, attention_mask) in variants.items():
                rope = rope_table(model.config, txt.shape[1], (rows, columns), CPU)
                out = model(case["img"], txt, modulations, rope, attention_mask)
                reporter.add(within(f"{GROUP}/transformer_forward/{number} {name}", out, case["out"], 1e-5))
            fused = prepared.run.fused
            conditioning = fused.condition([text[0, :kept]], (rows, columns))
            out = fused(case["img"][0], conditioning, modulations[0])
            reporter.add(within(f"{GROUP}/transformer_forward/{number} fused", out, case["out"], 1e-5))


def _schedule(path: Path, reporter: Reporter) -> None:
    for expected in json.loads(path.read_text(encoding="utf-8")):
        tokens, steps = expected["image_seq_len"], expected["steps"]
        scheduler = sampling.make_scheduler(tokens, steps, CPU)
        found = [sampling.shift_mu(tokens), *scheduler.timesteps.tolist(), *scheduler.sigmas.tolist()]
        wanted = [expected["mu"], *expected["timesteps"], *expected["sigmas"]]
        name = f"{GROUP}/schedule/{expected['width']}x{expected['height']} {steps} steps"
        reporter.add(
            within(
                name,
                torch.tensor(found, dtype=torch.float64),
                torch.tensor(wanted, dtype=torch.float64),
                1e-6,
            )
        )


def _noise(path: Path, reporter: Reporter) -> None:
    draw = "legacy" if path.stem.endswith("legacy") else "float32"
    for name, expected in Vectors.read(path).tensors.items():
        seed, size, dtype = name.split(".")
        width, height = (int(side) for side in size.split("x"))
        found = sampling.draw_noise(width, height, int(seed), getattr(torch, dtype), draw)
        result = identical(f"{GROUP}/{path.stem}/{name}", found, expected)
        if result.outcome is Outcome.FAIL and not has_avx2():
            result = within(result.case, found, expected, 1e-3, "not exact: this CPU has no AVX2")
        reporter.add(result)


def has_avx2() -> bool:
    """Whether this CPU draws the noise that was recorded, bit for bit."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def _pipeline(path: Path, reporter: Reporter) -> None:
    weights = _needs(path, "transformer_tiny.safetensors", reporter)
    if weights is None:
        return
    vae_path = path.with_name("vae_tiny.safetensors")
    vae = Vectors.read(vae_path).autoencoder(CPU, torch.float32) if vae_path.is_file() else None
    vectors = Vectors.read(path)
    for profile in PROFILES.values():
        if profile.float8_products:
            continue
        model = prepare_transformer(
            weights.chroma_config(),
            weights.tensors,
            (),
            profile,
            DevicePlacement(CPU, torch.float32),
            quantize=False,
        )
        for number in vectors.cases():
            case = vectors.of(number)
            width, height, steps, seed = (int(value) for value in case["args"])
            noise = sampling.draw_noise(width, height, seed, torch.float32, "float32")
            embedding = PromptEmbedding(
                case["prompt_embeds"], case["prompt_mask"], case["neg_embeds"], case["neg_mask"]
            )
            *_, last = denoise_from(model, embedding, noise, width, height, steps, float(case["guidance"]))
            name = f"{GROUP}/pipeline_fp32/{number} {profile.name}"
            reporter.add(within(name, last.latents, case["latents_packed"], 1e-5))
            if "image" not in case:
                continue
            if vae is None:
                reporter.add(skipped(f"{name} image", "vae_tiny.safetensors is not there"))
                continue
            decoder = fuse(vae) if profile.fused else vae
            image = autoencoder.decode(decoder, sampling.unpack(last.latents, width, height))
            reporter.add(within_abs(f"{name} image", image.permute(0, 2, 3, 1), case["image"], 1e-4))


def _text(path: Path, reporter: Reporter) -> None:
    weights = _needs(path, "t5_tiny.safetensors", reporter)
    if weights is None:
        return
    model = weights.text_encoder(dict(weights.tensors), CPU, torch.float32, quantize=False)
    vectors = Vectors.read(path)
    for number in vectors.cases():
        case = vectors.of(number)
        found = text_encoder.encode(model, case["input_ids"])
        reporter.add(within(f"{GROUP}/t5_embeds/{number}", found, case["embeds"], 1e-5))


def _merge(path: Path, reporter: Reporter) -> None:
    lora = path.with_name("lora_aitk.safetensors")
    vectors = Vectors.read(path)
    base = vectors.under("base.")
    adapter = None
    if lora.is_file():
        adapter = read_adapter(lora, {f"{name}.weight": tuple(w.shape) for name, w in base.items()})
    for name, merged in vectors.tensors.items():
        if not name.endswith(".merged"):
            continue
        stem = name.removesuffix(".merged")
        module = next((module for module in base if stem.endswith(f".{module}")), None)
        case = f"{GROUP}/lora_merge_float8/{stem}"
        if module is None:
            reporter.add(Result(case, Outcome.FAIL, note="names no module that has a base weight"))
            continue
        if adapter is None:
            reporter.add(skipped(f"{case} merged", "lora_aitk.safetensors is not there"))
        else:
            multiplier = float(stem.removesuffix(f".{module}"))
            found = adapter.apply(f"{module}.weight", base[module], multiplier)
            reporter.add(identical(f"{case} merged", found, merged))
        q, scale = quantize_rows(merged)
        expected = vectors.tensors
        if f"{stem}.float8" in expected:
            reporter.add(
                identical(f"{case} float8", q.view(torch.uint8), expected[f"{stem}.float8"].view(torch.uint8))
            )
        if f"{stem}.scale" in expected:
            reporter.add(identical(f"{case} scale", scale, expected[f"{stem}.scale"].reshape(-1)))
        if f"{stem}.dequantized" in expected:
            reporter.add(
                identical(f"{case} dequantized", dequantize_rows(q, scale), expected[f"{stem}.dequantized"])
            )
