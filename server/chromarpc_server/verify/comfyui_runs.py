"""`comfyui/chroma_tiny.safetensors`: whole runs, from the noise to what the autoencoder gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.denoising import SamplingChoice, denoise_from
from chromarpc_server.pipeline.merged_transformer import PreparedTransformer, prepare_transformer
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import PROFILES
from chromarpc_server.pipeline.samplers import SAMPLERS_BY_NAME
from chromarpc_server.verify.comfyui_sigmas import FLOAT32_STEP, flux_mu, furthest
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, skipped
from chromarpc_server.verify.vectors import Vectors

CPU = torch.device("cpu")
REL = 1e-5
FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159
"""Of the autoencoder's latents."""


def run(path: Path, models: Path, reporter: Reporter, group: str) -> None:
    """One case for each run, in float32, through weights without rounding."""
    weights = Vectors.read(models / "transformer_tiny.safetensors")
    transformer = prepare_transformer(
        weights.chroma_config(),
        weights.tensors,
        (),
        PROFILES["reference"],
        DevicePlacement(CPU, torch.float32),
        quantize=False,
    )
    vectors = Vectors.read(path)
    runs: Mapping[str, Mapping[str, Any]] = json.loads(vectors.metadata["runs"])
    recorded = {name.rsplit(".", 1)[0] for name in vectors.tensors}
    for name in sorted(recorded | set(runs)):
        case = f"{group}/{path.stem}/{name}"
        if name not in runs:
            reporter.add(Result(case, Outcome.FAIL, note="the header says nothing of this run"))
            continue
        facts, tensors = runs[name], vectors.under(f"{name}.")
        reporter.guarded(case, partial(_run, case, facts, tensors, runs, transformer, reporter))


def _run(
    case: str,
    facts: Mapping[str, Any],
    recorded: Mapping[str, Tensor],
    runs: Mapping[str, Mapping[str, Any]],
    transformer: PreparedTransformer,
    reporter: Reporter,
) -> None:
    if facts["sampler"] not in SAMPLERS_BY_NAME:
        reporter.add(skipped(case, f"the sampler {facts['sampler']} is refused"))
        return
    width, height = (side * sampling.PIXELS_PER_LATENT for side in reversed(recorded["noise"].shape[2:]))
    choice, note = _choice(facts, recorded["sigmas"].tolist(), runs)
    if choice is None:
        reporter.add(Result(case, Outcome.FAIL, note=note))
        return
    noise = sampling.draw_noise(width, height, facts["seed"], torch.float32, "float32")
    embedding = PromptEmbedding(*_text(recorded["positive"]), *_text(recorded["negative"]))
    steps = list(
        denoise_from(transformer, embedding, noise, width, height, facts["steps"], facts["cfg"], choice=choice)
    )
    unpacked = [sampling.unpack(step.predicted_x0, width, height) for step in steps]
    latents = sampling.unpack(steps[-1].latents, width, height)
    found = {
        "noise": sampling.unpack(noise, width, height),
        "denoised": torch.stack(unpacked),
        "latents": latents / FLUX_SCALING + FLUX_SHIFT,
    }
    distances = {part: distance(value, recorded[part]) for part, value in found.items()}
    worst = max(distances, key=lambda part: distances[part][0])
    outcome = Outcome.PASS if distances[worst][0] <= REL else Outcome.FAIL
    said = f"{worst}; {len(steps)} steps{f'; {note}' if note else ''}"
    reporter.add(Result(case, outcome, *distances[worst], f"rel {REL:g}", said))


def _text(embeds: Tensor) -> tuple[Tensor, Tensor]:
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.int64)


def _choice(
    facts: Mapping[str, Any], sigmas: Sequence[float], runs: Mapping[str, Mapping[str, Any]]
) -> tuple[SamplingChoice | None, str]:
    """What draws the recorded noise levels, and a note.

    `ComfyUI's default` names no numbers, and what a model has depends on the runs before: it is looked for among
    Chroma's own, none at all, and those of the other runs.
    """
    said = facts["sampling"]
    named: list[list[Any]] = [said] if isinstance(said, list) else [["flux", SamplingChoice().mu], ["aura", 1.0]]
    if not isinstance(said, list):
        named += [other["sampling"] for other in runs.values() if isinstance(other["sampling"], list)]
    for table, shift in named:
        if table not in ("aura", "flux"):
            return None, f"no table of noise levels is known for {table!r}"
        choice = SamplingChoice(
            sampler=facts["sampler"],
            schedule=facts["scheduler"],
            shift=float(shift) if table == "aura" else None,
            settings=DrawingSettings.COMFYUI,
            mu=flux_mu(shift) if table == "flux" else SamplingChoice().mu,
        )
        if furthest(choice.sigmas(facts["steps"], 0), sigmas)[0] <= FLOAT32_STEP:
            return choice, "" if isinstance(said, list) else f"noise levels as of {table} {shift}"
    return None, "the schedule's noise levels differ"
