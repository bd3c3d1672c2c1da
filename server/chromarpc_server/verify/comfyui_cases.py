"""`comfyui`: schedules, samplers, noise, tokens and whole runs as ComfyUI was recorded; always on a CPU.

The small models are those of `cpu_fp32` beside the folder. A file that is there and not known fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.bundled import t5_tokenizer_folder
from chromarpc_server.pipeline.models import text_encoder
from chromarpc_server.pipeline.models.text_encoder import TokenizedPrompt, Tokenizer
from chromarpc_server.pipeline.models.weighted_text import embed_weighted, tokenize_weighted
from chromarpc_server.pipeline.samplers import SAMPLERS_BY_NAME
from chromarpc_server.verify import comfyui_runs, comfyui_sigmas
from chromarpc_server.verify.float32_cases import GROUP as MODELS
from chromarpc_server.verify.float32_cases import has_avx2
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped, within
from chromarpc_server.verify.vectors import Vectors

CPU = torch.device("cpu")
GROUP = "comfyui"
DESCRIPTION = "README.md"
EXACT_REL, FLOAT32_REL = 1e-10, 1e-4
"""Of trajectories: in float64, and of UniPC, which ran in float32."""
REL = 1e-5
"""Of embeddings."""
TELLS_OTHER_X = ("ipndm", "ipndm_v", "deis", "uni_pc", "uni_pc_bh2")
"""Samplers that tell ComfyUI's callback something else than x before the step: x before the first one, or UniPC's
own scaled x. Their predicted x0 says the same."""


def find_folder(directory: Path) -> Path | None:
    """The folder of these vectors: the directory itself, or one in it."""
    inside = directory / GROUP
    if inside.is_dir():
        return inside
    itself = directory.name or directory.resolve().name
    has_files = any((directory / name).is_file() for name in ("trajectories.safetensors", "sigmas.json"))
    return directory if itself == GROUP or has_files else None


def run(directory: Path, reporter: Reporter) -> None:
    """Every file of the folder, where there is one."""
    folder = find_folder(directory)
    if folder is None:
        return
    models = folder.absolute().parent / MODELS
    checks: Mapping[str, Callable[[Path], object]] = {
        "sigmas.json": partial(comfyui_sigmas.run, reporter=reporter, group=GROUP),
        "trajectories.safetensors": partial(_trajectories, reporter=reporter),
        "noise.safetensors": partial(_noise, reporter=reporter),
        "tokens.json": partial(_tokens, reporter=reporter),
        "t5_tiny_embeds.safetensors": partial(_embeds, models=models, reporter=reporter),
        "chroma_tiny.safetensors": partial(comfyui_runs.run, models=models, reporter=reporter, group=GROUP),
    }
    for path in sorted(folder.iterdir()):
        check = checks.get(path.name)
        if check is not None:
            reporter.guarded(f"{GROUP}/{path.stem}", partial(check, path))
        elif path.name != DESCRIPTION:
            reporter.add(Result(f"{GROUP}/{path.name}", Outcome.FAIL, note="no file that is known here"))


def _trajectories(path: Path, reporter: Reporter) -> None:
    vectors = Vectors.read(path)
    schedules = json.loads(vectors.metadata["schedules"])
    stochastic = json.loads(vectors.metadata.get("stochastic", "[]"))
    cases = sorted({name.rsplit(".", 1)[0] for name in vectors.tensors if name.count(".") >= 2})
    for case in cases:
        name = f"{GROUP}/{path.stem}/{case}"
        schedule, sampler = case.rsplit(".", 1)
        draws_noise = sampler in stochastic or f"{case}.noise" in vectors.tensors
        if draws_noise and sampler not in SAMPLERS_BY_NAME:
            reporter.add(skipped(name, "draws fresh noise, and what ComfyUI draws depends on its device: refused"))
        elif sampler not in SAMPLERS_BY_NAME:
            reporter.add(Result(name, Outcome.FAIL, note=f"no sampler {sampler!r}"))
        else:
            reporter.guarded(
                name, partial(_trajectory, name, sampler, vectors, case, schedules[schedule], reporter)
            )


class _VelocityField:
    """v(x, σ) = A·vec(x) + b·σ + c."""

    def __init__(self, vectors: Vectors) -> None:
        self._matrix, self._by_sigma, self._constant = (vectors.tensors[name] for name in "Abc")
        self.asked: list[float] = []

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The predicted x0, in the dtype of x."""
        self.asked.append(sigma)
        velocity = self._matrix @ x.double().flatten() + self._by_sigma * sigma + self._constant
        return x - sigma * velocity.view(x.shape).to(x.dtype)


def _trajectory(
    name: str, sampler: str, vectors: Vectors, case: str, spec: Sequence[object], reporter: Reporter
) -> None:
    """Passes where schedule, levels that are asked about, every predicted x0 and the end agree."""
    model, recorded = _VelocityField(vectors), vectors.under(f"{case}.")
    expected = recorded["sigmas"].double()
    sigmas = comfyui_sigmas.recorded_schedule(spec, sampler)
    rel, _ = comfyui_sigmas.furthest(sigmas, expected.tolist())
    if rel > comfyui_sigmas.FLOAT32_STEP:
        reporter.add(Result(name, Outcome.FAIL, rel, note="the schedule's noise levels differ"))
        return
    start = recorded["x_steps"][0]
    if sampler.startswith("uni_pc"):
        start = start * float((1 + expected[0] ** 2).sqrt())
    steps = list(SAMPLERS_BY_NAME[sampler](model, start, expected.tolist()))
    tolerance = FLOAT32_REL if recorded["final"].dtype == torch.float32 else EXACT_REL
    asked = torch.tensor(model.asked, dtype=torch.float64)
    found = {
        "evaluated_at": asked,
        "denoised": torch.stack([step.denoised for step in steps]),
        "final": steps[-1].x,
    }
    if sampler not in TELLS_OTHER_X:
        found["x_steps"] = torch.stack([start, *(step.x for step in steps[:-1])])
    distances = {part: distance(value, recorded[part]) for part, value in found.items()}
    worst = max(distances, key=lambda part: distances[part][0])
    outcome = Outcome.PASS if distances[worst][0] <= tolerance else Outcome.FAIL
    note = f"{worst}; {len(steps)} steps"
    reporter.add(Result(name, outcome, *distances[worst], f"rel {tolerance:g}", note))


def _noise(path: Path, reporter: Reporter) -> None:
    for name, expected in Vectors.read(path).tensors.items():
        seed, size, *more = name.split(".")
        width, height = (int(side) for side in size.split("x"))
        found = _drawn(width, height, int(seed), *more)
        result = identical(f"{GROUP}/{path.stem}/{name}", found, expected)
        if result.outcome is Outcome.FAIL and not has_avx2():
            result = within(result.case, found, expected, 1e-3, "not exact: this CPU has no AVX2")
        reporter.add(result)


def _drawn(width: int, height: int, seed: int, kind: str = "") -> Tensor:
    """Noise of one image as it is served, or of ComfyUI's batches: `batch3`, `batch_index2`."""
    if not kind:
        packed = sampling.draw_noise(width, height, seed, torch.float32, "float32")
        return sampling.unpack(packed, width, height)
    side = sampling.PIXELS_PER_LATENT
    shape = (sampling.LATENT_CHANNELS, height // side, width // side)
    generator = torch.Generator("cpu").manual_seed(seed)
    if kind.startswith("batch_index"):
        one_by_one = [torch.randn(1, *shape, generator=generator) for _ in range(int(kind[11:]) + 1)]
        return one_by_one[-1]
    return torch.randn(int(kind.removeprefix("batch")), *shape, generator=generator)


def _tokens(path: Path, reporter: Reporter) -> None:
    tokenizer = Tokenizer(t5_tokenizer_folder())
    for index, case in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"]):
        found = tokenize_weighted(
            tokenizer,
            case["prompt"],
            min_padding=case["min_padding"] or 0,
            min_length=case["min_length"] or 0,
        )
        ids = found.ids[0].tolist()
        weights = list(found.weights) or [1.0] * len(ids)
        expected = case["weights"] if isinstance(case["weights"], list) else [case["weights"]] * len(case["ids"])
        same = ids == case["ids"] and weights == expected
        outcome = Outcome.PASS if same else Outcome.FAIL
        reporter.add(Result(f"{GROUP}/{path.stem}/{index}", outcome, tolerance="exact", note=f"{len(ids)} tokens"))


def _embeds(path: Path, models: Path, reporter: Reporter) -> None:
    weights = Vectors.read(models / "t5_tiny.safetensors")
    model = weights.text_encoder(dict(weights.tensors), CPU, torch.float32, quantize=False)
    vectors = Vectors.read(path)
    for case in sorted({name.rsplit(".", 1)[0] for name in vectors.tensors}):
        recorded = vectors.under(f"{case}.")
        ids, given = recorded["ids"], tuple(recorded["weights"][0].tolist())
        tokens = TokenizedPrompt(ids, torch.ones_like(ids), ids.shape[1], 0, given)
        found = embed_weighted(partial(text_encoder.encode, model), tokens)
        reporter.add(within(f"{GROUP}/{path.stem}/{case}", found, recorded["embeds"], REL))
