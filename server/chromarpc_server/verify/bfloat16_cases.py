"""`h100_bf16_float8`: vectors recorded on a GPU in bf16 with float8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.denoising import denoise_from
from chromarpc_server.pipeline.fused.decoder import fuse
from chromarpc_server.pipeline.merged_transformer import PreparedTransformer, prepare_transformer
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import PROFILES
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped, within
from chromarpc_server.verify.vectors import Vectors

ERROR_RATIO = 1.10
"""`reference` may be this much further from the truth than the reference's own output is."""
HEAVY_TOKENS_ON_CPU = 2048
"""Images of more tokens than this are left out on a CPU, and the report says so."""
IMAGE_MEAN, IMAGE_MAX = 1.0, 8.0
T5_REL = 2e-2


def run(folder: Path, group: str, device: torch.device, reporter: Reporter) -> None:
    """Every case of the folder, in bf16 on `device`, and in float32 on a CPU against the truth."""
    if (folder / "pipeline.safetensors").is_file():
        reporter.guarded(f"{group}/pipeline", lambda: _pipeline(folder, group, device, reporter))
    if (folder / "t5.safetensors").is_file():
        reporter.guarded(f"{group}/t5", lambda: _text(folder, group, device, reporter))


def _recorded_here(metadata: Mapping[str, str], device: torch.device) -> str:
    """Empty where GPU model and torch version are the recording's, else what differs."""
    if device.type != "cuda":
        return f"recorded on {metadata.get('gpu', 'a GPU')}, this is a CPU"
    name = torch.cuda.get_device_name(device)
    if name != metadata.get("gpu"):
        return f"recorded on {metadata.get('gpu')}, this is {name}"
    if torch.__version__ != metadata.get("torch"):
        return f"recorded with torch {metadata.get('torch')}, this is {torch.__version__}"
    return ""


def _pipeline(folder: Path, group: str, device: torch.device, reporter: Reporter) -> None:
    if not (folder / "transformer.safetensors").is_file():
        reporter.add(skipped(f"{group}/pipeline", "transformer.safetensors is not there"))
        return
    weights = Vectors.read(folder / "transformer.safetensors")
    vectors = Vectors.read(folder / "pipeline.safetensors")
    config = weights.chroma_config()
    differs = _recorded_here(vectors.metadata, device)
    for number in vectors.cases():
        case = vectors.of(number)
        name = f"{group}/pipeline/{number}"
        tokens = case["noise_packed"].shape[1]
        heavy = device.type == "cpu" and tokens > HEAVY_TOKENS_ON_CPU
        reason = f"{tokens} image tokens are heavy on a CPU"
        if heavy:
            for part in ("exact", "reference", "truth"):
                reporter.add(skipped(f"{name} {part}", reason))
            continue
        _exact(name, config, weights.tensors, case, device, differs, reporter)
        _reference(name, config, weights.tensors, case, device, reporter)
        if device.type == "cpu":
            _truth(name, config, weights.tensors, case, reporter)
        else:
            reporter.add(
                skipped(f"{name} truth", "float32 products on a GPU are no truth; verify it with --device cpu")
            )
        if "image_u8" in case:
            _image(folder, name, case, device, reporter)


def _draw(transformer: PreparedTransformer, case: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Latents after the last step, from the case's own noise."""
    width, height, steps, _ = (int(value) for value in case["args"])
    embedding = PromptEmbedding(case["prompt_embeds"], case["prompt_mask"], case["neg_embeds"], case["neg_mask"])
    *_, last = denoise_from(transformer, embedding, noise, width, height, steps, float(case["guidance"]))
    return last.latents


def _prepared(
    config: ChromaConfig,
    weights: Mapping[str, Tensor],
    profile: str,
    device: torch.device,
    dtype: torch.dtype,
) -> PreparedTransformer:
    return prepare_transformer(
        config, weights, (), PROFILES[profile], DevicePlacement(device, dtype), quantize=True
    )


def _exact(
    name: str,
    config: ChromaConfig,
    weights: Mapping[str, Tensor],
    case: dict[str, Tensor],
    device: torch.device,
    differs: str,
    reporter: Reporter,
) -> None:
    model = _prepared(config, weights, "exact", device, torch.bfloat16)
    found = _draw(model, case, case["noise_packed"].to(device))
    expected = case["latents_packed_reference"]
    if not differs:
        reporter.add(identical(f"{name} exact", found.cpu(), expected))
        return
    rel, max_abs = distance(found, expected)
    result = _ratio(f"{name} exact", found, case)
    note = f"{result.note}; {rel:.3g} (max {max_abs:.3g}) from the reference itself, not bit for bit: {differs}"
    reporter.add(Result(result.case, result.outcome, result.rel, result.max_abs, result.tolerance, note))


def _reference(
    name: str,
    config: ChromaConfig,
    weights: Mapping[str, Tensor],
    case: dict[str, Tensor],
    device: torch.device,
    reporter: Reporter,
) -> None:
    model = _prepared(config, weights, "reference", device, torch.bfloat16)
    reporter.add(_ratio(f"{name} reference", _draw(model, case, case["noise_packed"].to(device)), case))


def _ratio(name: str, found: Tensor, case: dict[str, Tensor]) -> Result:
    """Passes where `found` is at most 1.10 × as far from the truth as the reference's own output."""
    truth = case["latents_packed_truth"]
    own, _ = distance(case["latents_packed_reference"], truth)
    rel, max_abs = distance(found, truth)
    outcome = Outcome.PASS if rel <= ERROR_RATIO * own else Outcome.FAIL
    tolerance = f"{ERROR_RATIO:.2f} × the reference's {own:.3g}"
    return Result(name, outcome, rel, max_abs, tolerance, f"ratio {rel / own:.3f}" if own else "")


def _truth(
    name: str,
    config: ChromaConfig,
    weights: Mapping[str, Tensor],
    case: dict[str, Tensor],
    reporter: Reporter,
) -> None:
    """Float32 arithmetic on dequantized weights, with the bf16 timestep that is part of the function."""
    cpu = torch.device("cpu")
    model = _prepared(config, weights, "reference", cpu, torch.float32)
    width, height, steps, _ = (int(value) for value in case["args"])
    embedding = PromptEmbedding(
        case["prompt_embeds"].float(), case["prompt_mask"], case["neg_embeds"].float(), case["neg_mask"]
    )
    *_, last = denoise_from(
        model,
        embedding,
        case["noise_packed"].float(),
        width,
        height,
        steps,
        float(case["guidance"]),
        timestep_dtype=torch.bfloat16,
    )
    reporter.add(within(f"{name} truth", last.latents, case["latents_packed_truth"], 1e-5, "float32"))


def _image(folder: Path, name: str, case: dict[str, Tensor], device: torch.device, reporter: Reporter) -> None:
    if not (folder / "vae.safetensors").is_file():
        reporter.add(skipped(f"{name} image_u8", "vae.safetensors is not there"))
        return
    vae = Vectors.read(folder / "vae.safetensors").autoencoder(device, torch.bfloat16)
    width, height = (int(value) for value in case["args"][:2])
    latents = sampling.unpack(case["latents_packed_reference"].to(device), width, height)
    for label, decoder in (("image_u8", vae), ("image_u8 fused", fuse(vae))):
        pixels = torch.from_numpy(autoencoder.to_pixels(autoencoder.decode(decoder, latents)))
        expected = case["image_u8"].reshape(pixels.shape)
        difference = (pixels.double() - expected.double()).abs()
        mean, largest = float(difference.mean()), float(difference.max())
        outcome = Outcome.PASS if mean <= IMAGE_MEAN and largest <= IMAGE_MAX else Outcome.FAIL
        rel, _ = distance(pixels, expected)
        tolerance = f"mean {IMAGE_MEAN:g}, max {IMAGE_MAX:g}"
        reporter.add(Result(f"{name} {label}", outcome, rel, largest, tolerance, f"mean {mean:.3g}"))


def _text(folder: Path, group: str, device: torch.device, reporter: Reporter) -> None:
    vectors = Vectors.read(folder / "t5.safetensors")
    model = vectors.text_encoder(vectors.under("w."), device, torch.bfloat16, quantize=True)
    differs = _recorded_here(vectors.metadata, device)
    for number in vectors.cases():
        case = vectors.of(number)
        name = f"{group}/t5/{number}"
        found = text_encoder.encode(model, case["input_ids"]).cpu()
        if differs:
            reporter.add(within(name, found, case["embeds"], T5_REL, f"bf16, not bit for bit: {differs}"))
        else:
            reporter.add(identical(name, found, case["embeds"]))
