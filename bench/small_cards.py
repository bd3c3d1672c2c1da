"""Small cards: `python -m bench.small_cards FOLDER [--out FILE.json]`, with a checkpoint of `bench.synthetic`.

Another process holds the rest of the GPU, so that exactly 24, 16, 12, 11, 10 and 8 GiB of it are free by the
driver before this one begins; what then fits is planned as a server plans it, and drawn with a LoRA. For each size
and for the whole card: seconds of an image (median after a warm-up), the most memory by the driver, what is copied
in every step, how fast, and how much of that hides behind computing. The images have to be those of the whole
card, bit for bit, where nothing is decoded in tiles.

Times with another link are predicted. Copies run beside what is computed and the next one begins as soon as there
is room, so that a step takes the longer of the two:

    step  = max(computed, bytes copied / rate of the link)
    image = text + steps · step + decoding, where the text encoder's layers are copied once for each prompt

`computed` is the measured step less what it waited for copies. The GPU stays an H100: a card that has so little
memory computes several times longer, and hides as much more.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.gpu_holder import GIB, Holder
from bench.machine import commit
from bench.switching import random_adapter
from bench.timed_copier import Copied, TimedCopier
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    CheckpointFiles,
    Pipeline,
    PreparedTransformer,
    WeightFiles,
    choose_device,
    describe_device,
    finished_steps,
    library_versions,
    release_memory,
    synchronize,
)
from chromarpc_server.pipeline.fused.streaming import BlockStream

SIZES = (24.0, 16.0, 12.0, 11.0, 10.0, 8.0)
"""GiB."""
PROMPT = "a photograph of a red fox in the snow, early morning light, shallow depth of field, 85mm"
LINKS = {"PCIe Gen4 ×16": 25e9, "PCIe Gen4 ×8": 12.5e9}
"""Bytes a second."""
RANK = 16
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Case:
    """An image that is drawn."""

    name: str
    side: int
    steps: int
    guidance: float


CASES = (
    Case("guidance", 1024, 25, 4.0),
    Case("512", 512, 25, 4.0),
    Case("single pass", 1024, 8, 1.0),
)


@dataclass(frozen=True)
class Figure:
    """Of one case on one card; medians."""

    case: str
    side: int
    steps: int
    guidance: float
    total_s: float
    text_s: float
    step_s: float
    decode_s: float
    bytes_a_step: float
    rate: float | None
    """Bytes a second of the copies; None where there are none."""
    waited_s_a_step: float
    hidden: float | None
    """Share of the time of the copies that no block waited for."""
    equal_bits: bool | None
    """The image is the whole card's; None for that itself, and where images are decoded in tiles."""
    predicted: dict[str, float]
    """Seconds by link."""


def predicted_seconds(
    text_s: float, step_s: float, decode_s: float, steps: int, step_bytes: float, rate: float, text_copied_s: float
) -> float:
    """Of an image, by the formula above.

    Args:
        text_s: without its copies.
        step_s: without waiting.
        decode_s: in all.
        steps: how many.
        step_bytes: copied in each.
        rate: of the link, bytes a second.
        text_copied_s: of the text encoder's copies at this rate.
    """
    return text_s + text_copied_s + steps * max(step_s, step_bytes / rate) + decode_s


def draw(pipeline: Pipeline, case: Case, steps: int) -> tuple[npt.NDArray[np.uint8], tuple[float, float, float]]:
    """An image, and seconds of text, steps and decoding."""
    device = pipeline.device
    synchronize(device)
    marks = [time.perf_counter()]
    embedding = pipeline.encode(pipeline.tokenize(PROMPT))
    synchronize(device)
    marks.append(time.perf_counter())
    given = pipeline.denoise(
        embedding,
        width=case.side,
        height=case.side,
        steps=steps,
        guidance_scale=case.guidance,
        seed=42,
        noise_draw="float32",
    )
    latents = None
    for done in finished_steps(given, device, lambda seconds: time.sleep(max(0.0, seconds))):
        latents = done.latents
    assert latents is not None
    marks.append(time.perf_counter())
    pixels = pipeline.decode(latents, case.side, case.side)
    synchronize(device)
    marks.append(time.perf_counter())
    text, denoising, decoding = (later - earlier for earlier, later in pairwise(marks))
    return pixels, (text, denoising, decoding)


def measure(
    pipeline: Pipeline,
    case: Case,
    runs: int,
    blocks: BlockStream | None,
    whole: Mapping[str, npt.NDArray[np.uint8]],
    text_bytes: int,
) -> tuple[Figure, npt.NDArray[np.uint8]]:
    """One case.

    Args:
        pipeline: draws.
        case: what.
        runs: images that count.
        blocks: what streams, if anything does.
        whole: the whole card's images by case, as far as there are any.
        text_bytes: of the text encoder's layers, where they are copied for each prompt.
    """
    draw(pipeline, case, min(WARM_UP_STEPS, case.steps))
    copier = blocks.copier if blocks is not None and isinstance(blocks.copier, TimedCopier) else None
    copied = Copied()
    if copier is not None:
        copier.taken()
    times, pixels = [], None
    for _ in range(runs):
        pixels, seconds = draw(pipeline, case, case.steps)
        times.append(seconds)
    assert pixels is not None
    if copier is not None:
        copied = copier.taken()
    text_s, denoise_s, decode_s = (statistics.median(stage) for stage in zip(*times, strict=True))
    steps = runs * case.steps
    step_s, waited = denoise_s / case.steps, copied.waited_s / steps
    rate = copied.size_bytes / copied.seconds if copied.seconds else None
    text_copied = text_bytes / rate if rate else 0.0
    tiled = pipeline.tiled_beyond_px is not None
    expected = whole.get(case.name)
    figure = Figure(
        case=case.name,
        side=case.side,
        steps=case.steps,
        guidance=case.guidance,
        total_s=statistics.median(sum(seconds) for seconds in times),
        text_s=text_s,
        step_s=step_s,
        decode_s=decode_s,
        bytes_a_step=copied.size_bytes / steps,
        rate=rate,
        waited_s_a_step=waited,
        hidden=max(0.0, 1 - copied.waited_s / copied.seconds) if copied.seconds else None,
        equal_bits=None if expected is None or tiled else bool(np.array_equal(pixels, expected)),
        predicted={
            name: predicted_seconds(
                max(0.0, text_s - text_copied),
                step_s - waited,
                decode_s,
                case.steps,
                copied.size_bytes / steps,
                other,
                text_bytes / other,
            )
            for name, other in LINKS.items()
        }
        if rate
        else {},
    )
    return figure, pixels


def files_of(folder: Path) -> CheckpointFiles:
    """Of a checkpoint of `bench.synthetic`."""
    return CheckpointFiles(
        folder / "Chroma1-Base.safetensors", folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae"
    )


@dataclass
class Shared:
    """What all cards have in common: it is read, drawn and page-locked once."""

    adapter: Adapter | None = None
    images: dict[str, npt.NDArray[np.uint8]] | None = None
    kept: tuple[object, ...] = ()
    """Page-locked memory of earlier cards, and files that were hashed."""


def measure_card(
    load: Callable[[], Checkpoint], shared: Shared, profile: str, cases: Sequence[Case], runs: int
) -> dict[str, Any]:
    """Loads, plans, merges and draws on what is free now."""
    begun = time.perf_counter()
    checkpoint = load()
    loaded_s = time.perf_counter() - begun
    plan, device = checkpoint.memory, checkpoint.device
    if shared.adapter is None:
        shared.adapter = random_adapter(checkpoint.master, RANK, 1)
    prepared = checkpoint.allocate(PROFILES[profile])
    assert isinstance(prepared, PreparedTransformer)
    begun = time.perf_counter()
    prepared.switch([])
    synchronize(device)
    built_s = time.perf_counter() - begun
    begun = time.perf_counter()
    prepared.switch([(shared.adapter, 1.0)])
    synchronize(device)
    switched_s = time.perf_counter() - begun
    blocks = prepared.blocks
    if blocks is not None and device.type == "cuda":
        blocks.copier = TimedCopier(device)
    pipeline = checkpoint.pipeline(prepared)
    for _ in range(2):  # the second one is recorded, where anything is
        pipeline.encode(pipeline.tokenize(PROMPT))
    text_bytes = 0
    if plan is not None and plan.text_encoder == "host":
        layers = checkpoint.text_encoder.model.encoder.block
        text_bytes = sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))
    figures, images = [], {}
    for case in cases:
        figure, images[case.name] = measure(pipeline, case, runs, blocks, shared.images or {}, text_bytes)
        figures.append(figure)
    if shared.images is None:
        shared.images = images
    if plan is not None and plan.master == "host":
        shared.kept = (*checkpoint.shared, checkpoint.master, checkpoint.text_encoder)
    elif not shared.kept:
        shared.kept = checkpoint.shared
    return {
        "plan": None if plan is None else asdict(plan),
        "loaded_s": loaded_s,
        "built_s": built_s,
        "switched_s": switched_s,
        "host_bytes": 0 if plan is None else plan.host_bytes,
        "figures": [asdict(figure) for figure in figures],
    }


def line(row: Mapping[str, Any], whole: Mapping[str, Any] | None) -> str:
    """Of the printed table."""
    name = _name(row)
    if "failed" in row:
        return f"{name:>8}  failed: {row['failed']}"
    told = []
    for index, f in enumerate(row["figures"]):
        ratio = f" ×{f['total_s'] / whole['figures'][index]['total_s']:.3f}" if whole is not None else ""
        hidden = "" if f["hidden"] is None else f" {100 * f['hidden']:.0f} % hidden at {f['rate'] / 1e9:.1f} GB/s"
        bits = {True: " same bits", False: " OTHER BITS", None: ""}[f["equal_bits"]]
        told.append(f"{f['case']} {f['total_s']:.3f} s{ratio}{hidden}{bits}")
    plan = row["plan"] or {}
    streamed = row["figures"][0]["bytes_a_step"] / 1e9
    return (
        f"{name:>8}  peak {row['peak_bytes'] / 1e9:.2f} of {row['free_bytes'] / 1e9:.2f} GB, "
        f"{plan.get('streamed_blocks', 0)} blocks streamed ({streamed:.2f} GB a step)"
        f"{', tiled' if plan.get('tile_autoencoder') else ''}; {'; '.join(told)}; load {row['loaded_s']:.1f} s, "
        f"build {row['built_s']:.1f} s, switch {row['switched_s']:.2f} s, host {row['host_bytes'] / 1e9:.1f} GB"
    )


def _name(row: Mapping[str, Any]) -> str:
    return "whole" if row["gib"] is None else f"{row['gib']:g} GiB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="full-size checkpoint")
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=list(SIZES),
        help="GiB, in this order; the whole card comes first",
    )
    parser.add_argument("--profile", default="reference", choices=["reference", "fp8"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    arguments = _options()
    holder = Holder()  # before this process has a context
    choice = choose_device("cuda", "bfloat16")
    weights, shared, rows = WeightFiles(), Shared(), []
    load = partial(
        Checkpoint.load, files_of(arguments.folder), device=choice.device, dtype=choice.dtype, weights=weights
    )
    whole: dict[str, Any] | None = None
    try:
        for size in (None, *arguments.sizes):
            row: dict[str, Any] = {"gib": size}
            try:
                row["free_bytes"] = holder.leave(None if size is None else int(size * GIB))
                row |= measure_card(load, shared, arguments.profile, CASES, arguments.runs)
                row["peak_bytes"] = holder.peak_bytes()
            except Exception as error:  # noqa: BLE001 - the other sizes are measured all the same
                row["failed"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            print(line(row, whole), flush=True)
            if size is None and "failed" not in row:
                whole = row
            if arguments.out:
                result = {
                    "bench": "small-cards",
                    "device": asdict(describe_device(choice)),
                    "versions": dict(library_versions()),
                    "commit": commit(),
                    "profile": arguments.profile,
                    "rank": RANK,
                    "runs": arguments.runs,
                    "rows": rows,
                }
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            gc.collect()
            release_memory(choice.device)
    finally:
        holder.close()


if __name__ == "__main__":
    main()
