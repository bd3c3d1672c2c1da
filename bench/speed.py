"""Seconds from text to pixels for every profile, in one process: `python -m bench.speed [--out FILE.json]`.

Full size with random weights on a GPU, chroma-mini on a CPU. Prints a table and writes JSON with the machine, the
versions, medians and spread. A figure's floor is its counted FLOPs at the matmul rate measured in the same run.

The profiles that draw the trainer's picture are measured without an adapter and with one of each rank on every
linear of the blocks; what that path costs is said at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import commit
from bench.switching import random_adapter
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    CheckpointFiles,
    Pipeline,
    choose_device,
    describe_device,
    finished_steps,
    library_versions,
    synchronize,
)

RANKS = (0, 16, 128)
"""Of the adapters that trainer's profiles are measured with; 0 for none."""
PROMPT = "a photograph of a red fox in the snow, early morning light, shallow depth of field, 85mm"
STEPS = 25
GUIDANCE = 4.0
TARGETS = {
    ("reference", 1024, 1024): (5.0, 5.4),
    ("fp8", 1024, 1024): (3.3, 4.0),
    ("reference", 512, 512): (1.3, 1.5),
    ("fp8", 512, 512): (0.9, 1.1),
}
"""Seconds to reach, and seconds above which it is not done, on one H100."""
PREVIEW_TARGETS = {(16, 1024, 1024): 5.6, (16, 512, 512): 1.45, (128, 1024, 1024): 5.75}
"""Seconds at most of `preview` on one H100, by rank, width and height."""
PREVIEW_RATIO = 1.02
"""`preview` without an adapter to `reference`, at most."""
TRAINER_RANK = 16
TRAINER_SECONDS = {(1024, 1024): 22.35, (512, 512): 8.69}
"""Of ai-toolkit itself on one H100, 25 steps, guidance 4, an adapter of rank 16 on 228 modules; recorded apart."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    profile: str
    rank: int
    """Of the adapter; 0 for none."""
    modules: int
    """Linears that it lies beside."""
    width: int
    height: int
    steps: int
    runs: int
    total_s: float
    best_s: float
    worst_s: float
    text_s: float
    denoise_s: float
    decode_s: float
    step_s: float
    peak_gb: float
    teraflops: float
    floor_s: float
    relative_error: float | None
    """Of the latents after all steps, against the same in `truth`."""


@dataclass(frozen=True)
class PathCost:
    """What an adapter's low-rank path takes, against the same profile without one."""

    profile: str
    rank: int
    modules: int
    width: int
    height: int
    seconds: float
    """A picture."""
    percent: float


def path_costs(figures: Sequence[Figure]) -> list[PathCost]:
    """Of every figure with an adapter whose profile was measured without one at the same size."""
    bare = {(f.profile, f.width, f.height): f.total_s for f in figures if not f.rank}
    costs = []
    for f in figures:
        without = bare.get((f.profile, f.width, f.height))
        if f.rank and without is not None:
            more = f.total_s - without
            costs.append(PathCost(f.profile, f.rank, f.modules, f.width, f.height, more, 100 * more / without))
    return costs


def flops(pipeline: Pipeline, width: int, height: int, text_tokens: tuple[int, ...]) -> float:
    """Of one step: products of all linears with their tokens, and attention."""
    config = pipeline.transformer.config
    hidden, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    image = (width // 16) * (height // 16)
    block = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    total = 0.0
    for text in text_tokens:
        tokens = image + text
        total += tokens * block * (config.depth + config.depth_single_blocks)
        total += 4.0 * tokens * tokens * hidden * (config.depth + config.depth_single_blocks)
    return total


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large product, the best of several shapes."""
    size = 8192 if device.type == "cuda" else 1024
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        synchronize(device)
        begun = time.perf_counter()
        count = 20 if device.type == "cuda" else 3
        for _ in range(count):
            F.linear(x, w)
        synchronize(device)
        best = max(best, 2 * size**3 * count / (time.perf_counter() - begun))
    return best


def float8_rate(device: torch.device) -> float:
    """The same with float8 operands and a scale for each row."""
    size = 8192
    x, w = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(size, 1, device=device)
    best = 0.0
    for _ in range(3):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(20):
            torch._scaled_mm(x, w.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        synchronize(device)
        best = max(best, 2 * size**3 * 20 / (time.perf_counter() - begun))
    return best


def draw(
    pipeline: Pipeline, width: int, height: int, steps: int, guidance: float = GUIDANCE
) -> tuple[Tensor, dict[str, float]]:
    """One picture's latents, and seconds of each stage."""
    times = {}
    device = pipeline.device
    synchronize(device)
    begun = time.perf_counter()
    embedding = pipeline.encode(pipeline.tokenize(PROMPT))
    synchronize(device)
    times["text"] = time.perf_counter() - begun
    lap = time.perf_counter()
    latents = None
    given = pipeline.denoise(
        embedding, width=width, height=height, steps=steps, guidance_scale=guidance, seed=42, noise_draw="float32"
    )
    for done in finished_steps(given, device, _pause):
        latents = done.latents
    assert latents is not None
    times["denoise"] = time.perf_counter() - lap
    lap = time.perf_counter()
    pipeline.decode(latents, width, height)
    synchronize(device)
    times["decode"] = time.perf_counter() - lap
    times["total"] = time.perf_counter() - begun
    return latents, times


def _pause(seconds: float) -> None:
    time.sleep(max(0.0, seconds))


def measure(
    pipeline: Pipeline,
    adapter: Adapter | None,
    width: int,
    height: int,
    runs: int,
    steps: int,
    rate: Callable[[Pipeline], float],
) -> tuple[Figure, Tensor]:
    """Medians after warm-up. The floor does not count the adapter's products."""
    device = pipeline.device
    draw(pipeline, width, height, 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    done = [draw(pipeline, width, height, steps) for _ in range(runs)]
    peak = torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0

    def median(stage: str) -> float:
        return statistics.median(times[stage] for _, times in done)

    totals = [times["total"] for _, times in done]
    tokens = (pipeline.tokenize(PROMPT).token_count + 1, pipeline.tokenize("").token_count + 1)
    work = flops(pipeline, width, height, tokens) * steps
    figure = Figure(
        profile=pipeline.transformer.profile.name,
        rank=adapter_rank(adapter),
        modules=0 if adapter is None else len(adapter.changes),
        width=width,
        height=height,
        steps=steps,
        runs=runs,
        total_s=statistics.median(totals),
        best_s=min(totals),
        worst_s=max(totals),
        text_s=median("text"),
        denoise_s=median("denoise"),
        decode_s=median("decode"),
        step_s=median("denoise") / steps,
        peak_gb=peak,
        teraflops=work / 1e12,
        floor_s=work / rate(pipeline),
        relative_error=None,
    )
    return figure, done[-1][0]


def adapter_rank(adapter: Adapter | None) -> int:
    """Of all its changes; 0 for none."""
    return 0 if adapter is None else next(iter(adapter.changes.values())).rank or 0


def mini(device: torch.device, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """chroma-mini, for machines without a GPU."""
    folder = Path(__file__).parents[1] / "server" / "chromarpc_server" / "assets" / "chroma_mini"
    files = CheckpointFiles(
        transformer=folder / "chroma-mini.safetensors",
        text_encoder=folder / "text_encoder_2",
        tokenizer=folder / "tokenizer_2",
        vae=folder / "vae",
    )
    return Checkpoint.load(files, device=device, dtype=dtype)


HEADER = (
    f"{'profile':14}{'rank':>5}{'size':>11}{'seconds':>9}{'spread':>16}{'text':>7}{'decode':>8}{'ms/step':>10}"
    f"{'GB':>7}{'x floor':>9}{'x exact':>9}{'to ref.':>9}{'rel':>9}"
)


def line(f: Figure, figures: Sequence[Figure]) -> str:
    """Of the printed table; beside a figure what those before it make of it."""

    def against(profile: str) -> Figure | None:
        return next((o for o in figures if (o.profile, o.width, o.height) == (profile, f.width, f.height)), None)

    exact, reference = against("exact"), against("reference")
    faster = f"{exact.total_s / f.total_s:9.2f}" if exact else f"{'':9}"
    ratio = f"{f.total_s / reference.total_s:9.3f}" if reference else f"{'':9}"
    error = f"{f.relative_error:9.4f}" if f.relative_error is not None else ""
    return (
        f"{f.profile:14}{f.rank or '':>5}{f'{f.width}x{f.height}':>11}{f.total_s:9.3f}"
        f"{f'{f.best_s:.3f}-{f.worst_s:.3f}':>16}{f.text_s:7.3f}{f.decode_s:8.3f}{1000 * f.step_s:10.2f}"
        f"{f.peak_gb:7.1f}{f.total_s / f.floor_s:9.2f}{faster}{ratio}{error}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="+", default=["exact", "reference", "fp8", "preview", "preview-exact"])
    parser.add_argument("--sizes", nargs="+", help="such as 1024x1024")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="of the trainer's profiles")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--exact-runs", type=int, default=1, help="of unfused profiles, which are slow and vary little"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--trace", action="store_true", help="also print where the GPU's time goes in one step")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    arguments = _options()
    choice = choose_device("auto", "auto", threads=arguments.threads)
    device = choice.device
    if device.type == "cuda":
        from bench import synthetic  # noqa: PLC0415 - needs room

        checkpoint = synthetic.checkpoint(device)
        sizes = ["1024x1024", "512x512", "768x1344"]
        # The trainer's own time was recorded at these.
        trainer_sizes = [f"{width}x{height}" for width, height in TRAINER_SECONDS]
    else:
        checkpoint = mini(device)
        sizes = trainer_sizes = ["256x256"]
    if arguments.sizes:
        sizes = trainer_sizes = arguments.sizes
    rates = {False: matmul_rate(device, choice.dtype)}
    if device.type == "cuda":
        rates[True] = float8_rate(device)
    description = describe_device(choice)
    print(
        f"{description.name}, torch {torch.__version__}, {choice.dtype}; matmul {rates[False] / 1e12:.1f} TF/s",
        end="",
    )
    print(f", float8 {rates[True] / 1e12:.1f} TF/s" if True in rates else "", flush=True)

    def rate(pipeline: Pipeline) -> float:
        return rates.get(pipeline.transformer.profile.float8_products, rates[False])

    figures: list[Figure] = []

    def write() -> None:
        """After every figure, so that a run that is cut short leaves what it found."""
        if not arguments.out:
            return
        result = {
            "bench": "speed",
            "device": asdict(description),
            "versions": dict(library_versions()),
            "commit": commit(),
            "attention": attention_name(device, choice.dtype),
            "matmul_tflops": rates[False] / 1e12,
            "float8_tflops": rates[True] / 1e12 if True in rates else None,
            "figures": [asdict(figure) for figure in figures],
            "path_costs": [asdict(cost) for cost in path_costs(figures)],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    latents: dict[tuple[str, str], Tensor] = {}
    adapters = {
        rank: random_adapter(checkpoint.master, rank, 1) if rank else None for rank in (0, *arguments.ranks)
    }
    print(HEADER, flush=True)
    for name in arguments.profiles:
        profile = PROFILES[name]
        prepared = checkpoint.allocate(profile)
        for rank in arguments.ranks if profile.trainer else [0]:
            adapter = adapters[rank]
            prepared.switch([] if adapter is None else [(adapter, 1.0)])
            pipeline = checkpoint.pipeline(prepared)
            for size in trainer_sizes if profile.trainer else sizes:
                width, height = (int(side) for side in size.split("x"))
                runs = arguments.runs if profile.fused else arguments.exact_runs
                figure, drawn = measure(pipeline, adapter, width, height, runs, arguments.steps, rate)
                if not profile.trainer:
                    latents[name, size] = drawn
                figure = replace(figure, relative_error=_apart(latents, name, size))
                figures.append(figure)
                print(line(figure, figures), flush=True)
                write()
                if arguments.trace and device.type == "cuda":
                    trace(pipeline, width, height)
            del pipeline
        del prepared
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for cost in path_costs(figures):
        print(
            f"low-rank path, {cost.profile}, rank {cost.rank} on {cost.modules} modules, "
            f"{cost.width}x{cost.height}: {cost.seconds:+.3f} s a picture, {cost.percent:+.1f} %",
            flush=True,
        )


def _apart(latents: Mapping[tuple[str, str], Tensor], profile: str, size: str) -> float | None:
    """Relative L2 distance of a profile's latents from those of `exact`; None where either is missing."""
    mine, exact = latents.get((profile, size)), latents.get(("exact", size))
    if mine is None or exact is None or profile == "exact":
        return None
    return float((mine.float() - exact.float()).norm() / exact.float().norm())


def attention_name(device: torch.device, dtype: torch.dtype) -> str:
    """What the fused forward attends with."""
    from chromarpc_server.pipeline.fused.attention import select_attention  # noqa: PLC0415

    return select_attention(device, dtype, 128).name


def trace(pipeline: Pipeline, width: int, height: int) -> None:
    """Prints where one step's time goes on the GPU."""
    embedding = pipeline.encode(pipeline.tokenize(PROMPT))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in pipeline.denoise(
            embedding, width=width, height=height, steps=3, guidance_scale=GUIDANCE, seed=1, noise_draw="float32"
        ):
            pass
        synchronize(pipeline.device)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:16]
    for row in rows:
        print(f"    {row.self_device_time_total / 3e3:8.2f} ms/step  x{row.count / 3:5.0f}  {row.key[:90]}")


if __name__ == "__main__":
    main()
