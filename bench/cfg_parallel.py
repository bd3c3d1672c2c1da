"""One image on two GPUs, a pass of guidance each, beside one GPU: `python -m bench.cfg_parallel [--out FILE]`.

Full size with random weights, from text to pixels, both ways in turn in one process; on a machine with fewer than
two GPUs chroma-mini on a CPU twice, where it only shows that it runs. Beside seconds it says what a step takes
more than its conditional pass alone, how far the latents are from float32 against one GPU's, and whether each way
draws the same again. In the end: whether a pair draws the bits of one GPU in `exact`, and how long switching
adapters takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.error import _relative, latents
from bench.machine import commit
from bench.speed import GUIDANCE, STEPS, draw, mini
from bench.switching import random_adapter
from chromarpc_server.pipeline import (
    PROFILES,
    Checkpoint,
    Pipeline,
    PreparedTransformer,
    TransformerPair,
    choose_device,
    describe_device,
    library_versions,
    release_memory,
    synchronize,
)
from chromarpc_server.pipeline.placement import DevicePlacement

TARGETS = {
    ("reference", "1024x1024"): 2.82,
    ("fp8", "1024x1024"): 1.92,
    ("reference", "512x512"): 0.78,
    ("fp8", "512x512"): 0.56,
}
"""Seconds at most on two H100s, 25 steps."""
TARGET_RATIO = 1.85
"""One GPU's seconds to a pair's at 1024×1024, at least."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    profile: str
    size: str
    runs: int
    one_s: float
    pair_s: float
    """Medians of seconds from text to pixels."""
    one_spread_s: tuple[float, float]
    pair_spread_s: tuple[float, float]
    ratio: float
    pass_step_ms: float
    """A step of the conditional pass alone, on one GPU."""
    pair_step_ms: float
    same_again: bool
    """Each way drew the same latents in every run."""
    one_error: float | None = None
    pair_error: float | None = None
    """Relative distance of the last latents from float32, where that was measured."""
    graphs: tuple[int, int] | None = None
    """Steps recorded on each GPU of the pair so far."""


@dataclass(frozen=True)
class Switch:
    """Seconds of one switch from an adapter to another of the same rank."""

    profile: str
    one_s: float
    pair_s: float


def in_turn(
    pipelines: Sequence[Pipeline], width: int, height: int, steps: int, runs: int, guidance: float = GUIDANCE
) -> list[list[tuple[Tensor, dict[str, float]]]]:
    """What each pipeline drew, and its times, one after the other in every run."""
    for pipeline in pipelines:
        draw(pipeline, width, height, 3, guidance)
    done: list[list[tuple[Tensor, dict[str, float]]]] = [[] for _ in pipelines]
    for _ in range(runs):
        for pipeline, drawn in zip(pipelines, done, strict=True):
            found, times = draw(pipeline, width, height, steps, guidance)
            drawn.append((found.cpu(), times))
    return done


def measure(
    pipelines: tuple[Pipeline, Pipeline], size: str, steps: int, runs: int, truth: Tensor | None
) -> Figure:
    """One GPU's pipeline and a pair's.

    Args:
        pipelines: both with the same weights.
        size: such as 1024x1024.
        steps: of each picture.
        runs: of each pipeline.
        truth: latents after as many steps of `bench.speed`'s picture in float32, if they were computed.
    """
    width, height = (int(side) for side in size.split("x"))
    one, two = in_turn(pipelines, width, height, steps, runs)
    (alone,) = in_turn(pipelines[:1], width, height, steps, min(runs, 2), guidance=1.0)
    totals = [[times["total"] for _, times in done] for done in (one, two)]
    seconds = [statistics.median(those) for those in totals]
    errors = [None if truth is None else _relative(done[-1][0].float(), truth.cpu()) for done in (one, two)]
    pair = pipelines[1].transformer
    graphs = None
    if isinstance(pair, TransformerPair) and pair.profile.fused:
        graphs = tuple(transformer.run.recorded_count for transformer in (pair.first, pair.second))
    return Figure(
        profile=pair.profile.name,
        size=size,
        runs=runs,
        one_s=seconds[0],
        pair_s=seconds[1],
        one_spread_s=(min(totals[0]), max(totals[0])),
        pair_spread_s=(min(totals[1]), max(totals[1])),
        ratio=seconds[0] / seconds[1],
        pass_step_ms=1000 * statistics.median(times["denoise"] for _, times in alone) / steps,
        pair_step_ms=1000 * statistics.median(times["denoise"] for _, times in two) / steps,
        same_again=all(torch.equal(drawn, done[0][0]) for done in (one, two) for drawn, _ in done),
        one_error=errors[0],
        pair_error=errors[1],
        graphs=graphs,
    )


def made(checkpoint: Checkpoint, second: torch.device, profile: str) -> tuple[Pipeline, Pipeline]:
    """A pipeline on one GPU, and one of a pair whose first transformer is that same one."""
    paired = replace(checkpoint, second=second)
    pair = paired.allocate(PROFILES[profile])
    assert isinstance(pair, TransformerPair)
    pair.switch([])
    return checkpoint.pipeline(pair.first), paired.pipeline(pair)


def true_latents(checkpoint: Checkpoint, side: int, steps: int) -> Tensor:
    """After all steps of `bench.speed`'s picture, in float32."""
    placement = DevicePlacement(checkpoint.device, torch.float32, record_graphs=False)
    transformer = PreparedTransformer(checkpoint.config, checkpoint.master, PROFILES["reference"], placement)
    transformer.switch([])
    return latents(transformer, checkpoint, torch.float32, side, steps)[1]


def exact_is_equal(checkpoint: Checkpoint, second: torch.device, side: int) -> bool:
    """Whether both ways draw the same bits in `exact`."""
    one, two = (draw(pipeline, side, side, 3)[0].cpu() for pipeline in made(checkpoint, second, "exact"))
    return torch.equal(one, two)


def switches(
    pipelines: tuple[Pipeline, Pipeline], adapters: Sequence[object], cards: Sequence[torch.device]
) -> Switch:
    """The better of two switches each way."""

    def seconds(pipeline: Pipeline, adapter: object) -> float:
        for card in cards:
            synchronize(card)
        begun = time.perf_counter()
        pipeline.transformer.switch([(adapter, 1.0)])  # type: ignore[list-item]
        for card in cards:
            synchronize(card)
        return time.perf_counter() - begun

    one, two = pipelines
    seconds(two, adapters[0])
    pair_s = min(seconds(two, adapters[1]), seconds(two, adapters[0]))
    one_s = min(seconds(one, adapters[1]), seconds(one, adapters[0]))
    return Switch(one.transformer.profile.name, one_s, pair_s)


HEADER = (
    f"{'profile':11}{'size':>10}{'one s':>8}{'pair s':>8}{'spread':>14}{'ratio':>7}{'target':>8}{'pass ms':>9}"
    f"{'pair ms':>9}{'more ms':>9}{'graphs':>8}{'error one':>11}{'pair':>9}  again"
)


def line(f: Figure) -> str:
    """Of the printed table."""
    target = TARGETS.get((f.profile, f.size))
    errors = ("-", "-") if f.one_error is None else (f"{f.one_error:.5f}", f"{f.pair_error:.5f}")
    return (
        f"{f.profile:11}{f.size:>10}{f.one_s:8.3f}{f.pair_s:8.3f}"
        f"{f'{f.pair_spread_s[0]:.3f}-{f.pair_spread_s[1]:.3f}':>14}{f.ratio:7.3f}{target or '-':>8}"
        f"{f.pass_step_ms:9.2f}{f.pair_step_ms:9.2f}{f.pair_step_ms - f.pass_step_ms:9.2f}"
        f"{'-' if f.graphs is None else '{}+{}'.format(*f.graphs):>8}{errors[0]:>11}{errors[1]:>9}"
        f"  {'same' if f.same_again else 'DIFFERENT'}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="+", default=["reference", "fp8"])
    parser.add_argument("--sizes", nargs="+", help="such as 1024x1024; the smallest is measured against float32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-truth", action="store_true", help="leave out float32, which takes longest")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    arguments = _options()
    on_gpus = torch.cuda.device_count() > 1
    choice = choose_device("cuda:0" if on_gpus else "cpu", "auto")
    second = torch.device("cuda", 1) if on_gpus else choice.device
    choice = replace(choice, second=second)
    description = describe_device(choice)
    if on_gpus:
        from bench import synthetic  # noqa: PLC0415 - needs room

        checkpoint = synthetic.checkpoint(choice.device)
        peers = torch.cuda.can_device_access_peer(0, 1)
    else:
        checkpoint = mini(choice.device)
        peers = False
    sizes = arguments.sizes or (["1024x1024", "512x512"] if on_gpus else ["128x128"])
    begun = time.monotonic()
    print(
        f"2 × {description.name}, torch {torch.__version__}, peer access: {'yes' if peers else 'no'}", flush=True
    )

    smallest = min(sizes, key=lambda size: int(size.split("x")[0]))
    truth = None
    if not arguments.no_truth:
        truth = true_latents(checkpoint, int(smallest.split("x")[0]), arguments.steps)
        release_memory(choice.device)
    adapters = [random_adapter(checkpoint.master, 16, seed) for seed in (1, 2)]
    figures: list[Figure] = []
    switched: list[Switch] = []
    exact: bool | None = None

    def write() -> None:
        """After every figure, so that a run that is cut short leaves what it found."""
        if not arguments.out:
            return
        result = {
            "bench": "cfg_parallel",
            "device": asdict(description),
            "versions": dict(library_versions()),
            "commit": commit(),
            "peer_access": peers,
            "steps": arguments.steps,
            "figures": [asdict(figure) for figure in figures],
            "switches": [asdict(one) for one in switched],
            "exact_is_equal": exact,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    print(HEADER, flush=True)
    for profile in arguments.profiles:
        pipelines = made(checkpoint, second, profile)
        for size in sizes:
            known = truth if size == smallest else None
            figures.append(measure(pipelines, size, arguments.steps, arguments.runs, known))
            print(line(figures[-1]), flush=True)
            write()
        switched.append(switches(pipelines, adapters, choice.cards))
        print(f"{profile}: a switch takes {switched[-1].one_s:.3f} s on one, {switched[-1].pair_s:.3f} s on both")
        del pipelines
        gc.collect()
        for card in choice.cards:
            release_memory(card)
    exact = exact_is_equal(checkpoint, second, int(smallest.split("x")[0]))
    print(f"exact: {'the same bits' if exact else 'DIFFERENT BITS'}")
    if on_gpus:
        peaks = ", ".join(f"{torch.cuda.max_memory_reserved(card) / 1e9:.1f}" for card in choice.cards)
        print(f"peak memory {peaks} GB, of which the master weights and one GPU's graphs are on the first")
    print(f"{time.monotonic() - begun:.0f} s after the weights were made", flush=True)
    write()


if __name__ == "__main__":
    main()
