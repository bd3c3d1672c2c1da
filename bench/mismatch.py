"""What drawing a sample otherwise than the trainer costs: `python -m bench.mismatch [RUN …] [--out FILE.json]`.

Takes training runs that were recorded on chroma-mini (folders with `expected.safetensors`; the one in
tests/goldens unless told otherwise) and draws their samples again on a CPU: first as the trainer did, then with
one thing wrong at a time. Every picture becomes a JPEG as the trainer writes it, and is measured against the
trainer's own file. Prints the table that docs/preview-mismatch.md holds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from bench.machine import commit
from bench.results_file import ROOT, Json, table
from bench.speed import mini
from chromarpc.replay.similarity import compare
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    choose_device,
    describe_device,
    library_versions,
    read_adapter,
)
from chromarpc_server.pipeline.weights.stored import as_they_are
from chromarpc_server.verify.vectors import Vectors

RECORDED = ROOT / "tests" / "goldens" / "preview" / "runs" / "exact"
VECTORS = "expected.safetensors"
TRIGGER = "hlw"
"""The trigger word of the recorded runs."""
TALL_PX = 208
"""A height that is floored to itself by 16 and to 192 by 32. No recorded sample has such a size."""


@dataclass(frozen=True)
class Sample:
    """One sample of a run as the trainer drew it, and the files that a mismatch may take instead."""

    file: Path
    step: int
    index: int
    first_seed: int
    """Of the run's first sample, which `walk_seed` counts from."""
    other_adapter: Path | None
    """Another step's file."""


@dataclass(frozen=True)
class Drawing:
    """All that decides a picture."""

    prompt: str
    negative: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: float
    adapter: Path | None
    multiplier: float
    settings: TrainerSettings
    noise_draw: str = "float32"
    profile: str = "preview"
    merged_first: bool = False
    """Whether the adapter is merged into the stored weights, before they are quantized."""


Change = Callable[[Drawing, Sample], Drawing]


@dataclass(frozen=True)
class Mismatch:
    """One thing that is otherwise than in the trainer."""

    name: str
    change: Change
    """Of a sample that it would not change, it gives the same drawing."""


@dataclass(frozen=True)
class Figure:
    """One picture."""

    mismatch: str
    step: int
    index: int
    psnr_db: float
    """Of the JPEGs, against the trainer's own sample."""
    ssim: float


def _with_settings(**changes: object) -> Change:
    return lambda drawing, _: replace(drawing, settings=replace(drawing.settings, **changes))  # type: ignore[arg-type]


def _merged_first(drawing: Drawing, _: Sample) -> Drawing:
    return replace(drawing, merged_first=drawing.adapter is not None)


def _fixed_seed(drawing: Drawing, sample: Sample) -> Drawing:
    walked = drawing.seed == sample.first_seed + sample.index
    return replace(drawing, seed=sample.first_seed) if walked else drawing


def _flags_in_prompt(drawing: Drawing, _: Sample) -> Drawing:
    flags = f"--s {drawing.steps} --w {drawing.width} --h {drawing.height} --seed {drawing.seed}"
    return replace(drawing, prompt=f"{drawing.prompt} {flags}")


def _another_step(drawing: Drawing, sample: Sample) -> Drawing:
    return drawing if sample.other_adapter is None else replace(drawing, adapter=sample.other_adapter)


def _as_the_reference(drawing: Drawing, _: Sample) -> Drawing:
    return replace(drawing, profile="reference", negative="")


MISMATCHES = (
    Mismatch("nothing: `preview`", lambda drawing, _: drawing),
    Mismatch("all that the reference does otherwise: `--profile reference`", _as_the_reference),
    Mismatch("merged before quantizing, instead of beside the quantized weights", _merged_first),
    Mismatch("another quantizer: `float8` instead of `qfloat8`", _with_settings(qtype="float8")),
    Mismatch("another quantizer: `qint8`", _with_settings(qtype="qint8")),
    Mismatch("transformer not quantized, adapter merged", _with_settings(quantize=False)),
    Mismatch("text encoder not quantized", _with_settings(quantize_te=False)),
    Mismatch("negative text ignored", lambda drawing, _: replace(drawing, negative="")),
    Mismatch("the seed's older noise draw", lambda drawing, _: replace(drawing, noise_draw="legacy")),
    Mismatch("`walk_seed` ignored", _fixed_seed),
    Mismatch(
        "`[trigger]` left as written",
        lambda drawing, _: replace(drawing, prompt=drawing.prompt.replace(TRIGGER, "[trigger]")),
    ),
    Mismatch("flags left in the prompt", _flags_in_prompt),
    Mismatch("25 steps, instead of 8 or 10", lambda drawing, _: replace(drawing, steps=25)),
    Mismatch("guidance lower by 1", lambda drawing, _: replace(drawing, guidance=drawing.guidance - 1)),
    Mismatch("multiplier ignored: 1", lambda drawing, _: replace(drawing, multiplier=1.0)),
    Mismatch(
        "the LoRA loaded twice",
        lambda drawing, _: replace(drawing, multiplier=drawing.multiplier * (2 if drawing.adapter else 1)),
    ),
    Mismatch("another step's LoRA", _another_step),
    Mismatch("no LoRA", lambda drawing, _: replace(drawing, adapter=None)),
)
FLOORED = f"floored to 32 instead of 16: {TALL_PX} px drawn as 192"


class Artist:
    """Draws on chroma-mini, and holds the adapters that it has read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._adapters: dict[Path, Adapter] = {}

    def draw(self, drawing: Drawing) -> Image.Image:
        """One picture."""
        profile = PROFILES[drawing.profile]
        checkpoint, adapters = self._with_adapter(drawing)
        pipeline = checkpoint.prepare(adapters, profile, drawing.settings if profile.trainer else None)
        negative = pipeline.tokenize(drawing.negative) if profile.trainer else None
        *_, last = pipeline.denoise(
            pipeline.encode(pipeline.tokenize(drawing.prompt), negative),
            width=drawing.width,
            height=drawing.height,
            steps=drawing.steps,
            guidance_scale=drawing.guidance,
            seed=drawing.seed,
            noise_draw=drawing.noise_draw,
        )
        return Image.fromarray(pipeline.decode(last.latents, drawing.width, drawing.height))

    def _with_adapter(self, drawing: Drawing) -> tuple[Checkpoint, list[tuple[Adapter, float]]]:
        if drawing.adapter is None or not drawing.multiplier:
            return self._checkpoint, []
        adapter = self._adapters.get(drawing.adapter)
        if adapter is None:
            adapter = self._adapters[drawing.adapter] = read_adapter(drawing.adapter, self._checkpoint.targets)
        if not drawing.merged_first:
            return self._checkpoint, [(adapter, drawing.multiplier)]
        merged = {
            name: adapter.apply(name, stored.dense(), drawing.multiplier)
            for name, stored in self._checkpoint.master.items()
        }
        return replace(self._checkpoint, master=as_they_are(merged)), []


def as_jpeg(image: Image.Image) -> bytes:
    """As the trainer writes it: Pillow's defaults."""
    written = io.BytesIO()
    image.save(written, "JPEG")
    return written.getvalue()


def recorded(place: Path, steps: Sequence[int]) -> list[tuple[Sample, Drawing]]:
    """What a run's trainer drew at these steps from adapters that are still there.

    Raises:
        ValueError: the folder holds no recorded run.
    """
    folders = [path for path in sorted(place.iterdir()) if (path / "samples").is_dir()]
    if len(folders) != 1 or not (place / VECTORS).is_file():
        raise ValueError(f"{place}: holds no recorded run")
    folder = folders[0]
    facts: list[Mapping[str, object]] = json.loads(Vectors.read(place / VECTORS).metadata["samples"])
    adapters = {path for f in facts if f["checkpoint"] and (path := folder / str(f["checkpoint"])).is_file()}
    found = []
    for f in facts:
        adapter = folder / str(f["checkpoint"]) if f["checkpoint"] else None
        step = int(str(f["step"]))
        if step not in steps or (adapter is not None and adapter not in adapters):
            continue
        others = sorted(adapters - {adapter}) if adapter else []
        sample = Sample(
            folder / str(f["file"]),
            step,
            int(str(f["index"])),
            int(str(facts[0]["seed"])),
            next(iter(others), None),
        )
        settings = TrainerSettings(bool(f["quantize"]), str(f["qtype"]), bool(f["quantize_te"]))
        drawing = Drawing(
            prompt=str(f["prompt"]),
            negative=str(f["negative_prompt"]),
            width=int(str(f["width"])),
            height=int(str(f["height"])),
            seed=int(str(f["seed"])),
            steps=int(str(f["steps"])),
            guidance=float(str(f["guidance_scale"])),
            adapter=adapter,
            multiplier=float(str(f["network_multiplier"])),
            settings=settings,
        )
        found.append((sample, drawing))
    return found


def measure(artist: Artist, samples: Sequence[tuple[Sample, Drawing]]) -> Iterable[Figure]:
    """One figure for every sample that a mismatch changes."""
    for mismatch in MISMATCHES:
        for sample, right in samples:
            wrong = mismatch.change(right, sample)
            if wrong == right and mismatch is not MISMATCHES[0]:
                continue
            alike = compare(as_jpeg(artist.draw(wrong)), sample.file.read_bytes())
            yield Figure(mismatch.name, sample.step, sample.index, alike.psnr_db, alike.ssim)
    for sample, right in samples:
        # No trainer's sample has such a size, so `preview` stands for it, and the lower picture is stretched.
        tall, low = (artist.draw(replace(right, height=height)) for height in (TALL_PX, 192))
        alike = compare(as_jpeg(low.resize(tall.size, Image.Resampling.LANCZOS)), as_jpeg(tall))
        yield Figure(FLOORED, sample.step, sample.index, alike.psnr_db, alike.ssim)


def mismatch_table(result: Json) -> str:
    """In Markdown: for each mismatch its samples, the median PSNR and the least."""
    rows = []
    for name in dict.fromkeys(f["mismatch"] for f in result["figures"]):
        those = [f for f in result["figures"] if f["mismatch"] == name]
        decibels = [f["psnr_db"] for f in those]
        ssim = statistics.median(f["ssim"] for f in those)
        rows.append(
            [name, str(len(those)), f"{statistics.median(decibels):.1f}", f"{min(decibels):.1f}", f"{ssim:.3f}"]
        )
    return table(("what is otherwise", "samples", "median dB", "least dB", "median SSIM"), rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", default=[RECORDED])
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500], help="of the training")
    parser.add_argument("--samples", type=int, help="of each run, at most")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU: for so small a model more only wait")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    choice = choose_device("cpu", "float32", threads=arguments.threads)
    artist = Artist(mini(choice.device))
    samples = [found for run in arguments.runs for found in recorded(run, arguments.steps)[: arguments.samples]]
    print(f"{describe_device(choice).name}, torch {torch.__version__}, {len(samples)} samples", flush=True)
    figures = []
    for figure in measure(artist, samples):
        figures.append(figure)
        where = f"step {figure.step}, sample {figure.index}"
        print(f"{figure.psnr_db:6.1f} dB, SSIM {figure.ssim:.3f}  {where}: {figure.mismatch}", flush=True)
    result = {
        "bench": "mismatch",
        "device": asdict(describe_device(choice)),
        "versions": dict(library_versions()),
        "commit": commit(),
        "runs": [run.name for run in arguments.runs],
        "figures": [asdict(figure) for figure in figures],
    }
    print(mismatch_table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
