"""What the trainer's picture costs: `python -m bench.preview [--exact] [--out FILE.json]`.

Full size with random weights on a GPU, chroma-mini on a CPU. Seconds from text to pixels in the `preview` profile
without an adapter and with one of each rank, beside `reference` in the same process, and the milliseconds that
another adapter or multiplier takes. `--exact` adds one picture in `preview-exact`, the trainer's own sequence of
operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.machine import commit
from bench.speed import STEPS, attention_name, draw, mini
from bench.switching import random_adapter
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    choose_device,
    describe_device,
    library_versions,
    synchronize,
)
from chromarpc_server.pipeline.checkpoint import Transformer

RANKS = (0, 16, 128)
TARGETS = {(16, 1024): 5.6, (16, 512): 1.45, (128, 1024): 5.75}
"""Seconds at most on one H100, by rank and side."""


@dataclass(frozen=True)
class Figure:
    """One line of the first table."""

    profile: str
    rank: int
    side: int
    runs: int
    total_s: float
    best_s: float
    worst_s: float
    denoise_s: float


@dataclass(frozen=True)
class Switch:
    """One line of the second table; milliseconds, medians."""

    rank: int
    first_ms: float
    """From no adapter, with room for it to be made."""
    adapter_ms: float
    multiplier_ms: float
    rewritten_tensors: int
    """Of another adapter: layers whose factors were written; base weights are not."""
    graphs_recorded: int
    """By pictures after a switch within the bucket; 0 where none had to be."""


def timed(
    transformer: Transformer, adapters: list[tuple[Adapter, float]], device: torch.device
) -> tuple[float, int]:
    """Milliseconds of a switch, and how many tensors it wrote."""
    synchronize(device)
    begun = time.perf_counter()
    report = transformer.switch(adapters)
    synchronize(device)
    return 1000 * (time.perf_counter() - begun), report.rewritten_tensors


def measure(
    checkpoint: Checkpoint, transformer: Transformer, rank: int, side: int, runs: int, steps: int
) -> Figure:
    """Medians after warm-up."""
    pipeline = checkpoint.pipeline(transformer)
    draw(pipeline, side, side, 2)
    times = [draw(pipeline, side, side, steps)[1] for _ in range(runs)]
    totals = [each["total"] for each in times]
    return Figure(
        transformer.profile.name,
        rank,
        side,
        runs,
        statistics.median(totals),
        min(totals),
        max(totals),
        statistics.median(each["denoise"] for each in times),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    choice = choose_device("auto", "auto")
    device = choice.device
    if device.type == "cuda":
        from bench import synthetic  # noqa: PLC0415 - needs room

        checkpoint, sizes = synthetic.checkpoint(device), arguments.sizes or [1024, 512]
    else:
        checkpoint, sizes = mini(device), arguments.sizes or [256]
    print(f"{describe_device(choice).name}, torch {torch.__version__}, {choice.dtype}", flush=True)
    figures: list[Figure] = []
    switches: list[Switch] = []

    def told(figure: Figure) -> None:
        figures.append(figure)
        base = next((f for f in figures if f.profile == "reference" and f.side == figure.side), figure)
        target = TARGETS.get((figure.rank, figure.side), "") if figure.profile == "preview" else ""
        seconds = f"{figure.total_s:8.3f} s ({figure.best_s:.3f}-{figure.worst_s:.3f})"
        ratio = f"{figure.total_s / base.total_s:.3f} x reference"
        print(
            f"{figure.profile:14}rank {figure.rank:4} {figure.side:5} px {seconds}  {ratio} {target}",
            flush=True,
        )

    reference = checkpoint.allocate(PROFILES["reference"])
    reference.switch([])
    for side in sizes:
        told(measure(checkpoint, reference, 0, side, arguments.runs, arguments.steps))
    del reference
    preview = checkpoint.allocate(PROFILES["preview"])
    for rank in RANKS:
        if rank == 0:
            preview.switch([])
        else:
            one, other = (random_adapter(checkpoint.master, rank, seed) for seed in (1, 2))
            first, _ = timed(preview, [(one, 1.0)], device)
        for side in sizes:
            told(measure(checkpoint, preview, rank, side, arguments.runs, arguments.steps))
        if rank:
            before = preview.run.recorded_count
            changes = [timed(preview, [((other, one)[k % 2], 1.0)], device) for k in range(6)]
            scales = [timed(preview, [(one, 0.5 + 0.1 * k)], device)[0] for k in range(6)]
            draw(checkpoint.pipeline(preview), sizes[-1], sizes[-1], 2)
            switch = Switch(
                rank,
                first,
                statistics.median(ms for ms, _ in changes),
                statistics.median(scales),
                changes[0][1],
                preview.run.recorded_count - before,
            )
            switches.append(switch)
            print(f"rank {rank}: {asdict(switch)}", flush=True)
    if arguments.exact:
        del preview
        exact = checkpoint.allocate(PROFILES["preview-exact"])
        exact.switch([(random_adapter(checkpoint.master, 16, 1), 1.0)])
        for side in sizes:
            told(measure(checkpoint, exact, 16, side, 1, arguments.steps))
    if arguments.out:
        result = {
            "bench": "preview",
            "device": asdict(describe_device(choice)),
            "versions": dict(library_versions()),
            "commit": commit(),
            "attention": attention_name(device, choice.dtype),
            "figures": [asdict(figure) for figure in figures],
            "switches": [asdict(switch) for switch in switches],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
