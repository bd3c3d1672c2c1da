"""`preview/runs`: folders that training runs left behind; their samples are drawn again on chroma-mini."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import Checkpoint, CheckpointFiles, NumericsProfile, read_adapter
from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.profiles import PREVIEW, PREVIEW_EXACT
from chromarpc_server.verify.preview_layout import RUN_VECTORS, Kind
from chromarpc_server.verify.preview_models import base_version
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped
from chromarpc_server.verify.vectors import Vectors

MINI = Path(__file__).parents[1] / "assets" / "chroma_mini"
MIN_PSNR_DB, MEDIAN_PSNR_DB = 40.0, 45.0
"""Of a redrawn sample against the trainer's file, both as JPEG: the least of any, and the least median."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Sample:
    """One sample as the trainer drew it."""

    facts: Mapping[str, object]
    latents: Tensor
    file: Path

    @property
    def step(self) -> int:
        return int(str(self.facts["step"]))

    @property
    def label(self) -> str:
        return f"{self.step:09d}/{self.facts['index']}"

    @property
    def settings(self) -> TrainerSettings:
        return TrainerSettings(
            quantize=bool(self.facts["quantize"]),
            qtype=str(self.facts["qtype"]),
            quantize_te=bool(self.facts["quantize_te"]),
            dtype="float32" if self.facts["dtype"] == "float32" else "bfloat16",
        )


def run(folder: Path, device: torch.device, reporter: Reporter) -> None:
    """Every run whose vectors lie in the folder or in one of its folders."""
    places = [folder] if (folder / RUN_VECTORS).is_file() else sorted(folder.iterdir())
    for place in places:
        if (place / RUN_VECTORS).is_file():
            name = f"{Kind.RUNS}/{place.name}"
            reporter.guarded(name, lambda place=place, name=name: _Run(place, name, device, reporter).check())  # type: ignore[misc]


class _Run:
    """One run's folder and what its trainer drew."""

    def __init__(self, place: Path, name: str, device: torch.device, reporter: Reporter) -> None:
        self._name = name
        self._device = device
        self._reporter = reporter
        self._vectors = Vectors.read(place / RUN_VECTORS)
        folders = [path for path in sorted(place.iterdir()) if (path / "samples").is_dir()]
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} run folders lie beside {RUN_VECTORS}, and there must be one")
        self._folder = folders[0]
        self._is_held = self._vectors.metadata.get("held", "").startswith("what the files say")
        self._adapters: dict[str, Adapter] = {}

    def check(self) -> None:
        """All samples, in both profiles."""
        samples = [self._sample(facts) for facts in json.loads(self._vectors.metadata["samples"])]
        self._exact(samples)
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        checkpoint = _load(self._device, dtype)
        found = [psnr for sample in samples if (psnr := self._redraw(checkpoint, sample)) is not None]
        if found:
            median = statistics.median(found)
            outcome = Outcome.PASS if median >= MEDIAN_PSNR_DB else Outcome.FAIL
            note = f"{median:.1f} dB of {len(found)} samples, at least {min(found):.1f} dB"
            self._reporter.add(
                Result(f"{self._name} median", outcome, tolerance=f"{MEDIAN_PSNR_DB:g} dB", note=note)
            )

    def _sample(self, facts: Mapping[str, object]) -> _Sample:
        step, index = int(str(facts["step"])), facts["index"]
        latents = self._vectors.tensors[f"{step:09d}.{index}.latents"]
        return _Sample(facts, latents, self._folder / str(facts["file"]))

    def _adapter(self, checkpoint: Checkpoint, sample: _Sample) -> list[tuple[Adapter, float]] | None:
        """The saved adapter that the sample was drawn with; None where it was deleted."""
        name = sample.facts["checkpoint"]
        if name is None:
            return []
        path = self._folder / str(name)
        if not path.is_file():
            return None
        if path.name not in self._adapters:
            self._adapters[path.name] = read_adapter(path, checkpoint.targets)
        return [(self._adapters[path.name], float(str(sample.facts["network_multiplier"])))]

    def _draw(
        self, checkpoint: Checkpoint, sample: _Sample, profile: NumericsProfile
    ) -> tuple[Tensor, Image.Image] | None:
        adapters = self._adapter(checkpoint, sample)
        if adapters is None:
            return None
        facts = {name: str(value) for name, value in sample.facts.items()}
        pipeline = checkpoint.prepare(adapters, profile, sample.settings)
        width, height = int(facts["width"]), int(facts["height"])
        embedding = pipeline.encode(
            pipeline.tokenize(facts["prompt"]), pipeline.tokenize(facts["negative_prompt"])
        )
        *_, last = pipeline.denoise(
            embedding,
            width=width,
            height=height,
            steps=int(facts["steps"]),
            guidance_scale=float(facts["guidance_scale"]),
            seed=int(facts["seed"]),
            noise_draw="float32",
        )
        return last.latents.cpu(), Image.fromarray(pipeline.decode(last.latents, width, height))

    def _exact(self, samples: Sequence[_Sample]) -> None:
        """The trainer's own bits, on a CPU that sums as the trainer's did."""
        recorded = self._vectors.metadata.get("torch", "")
        differs = ""
        if base_version(recorded) != base_version(torch.__version__):
            differs = f"recorded with torch {recorded}, this is {torch.__version__}"
        checkpoint = _load(CPU, torch.float32)
        for count, sample in enumerate(samples):
            case = f"{self._name}/{sample.label} exact"
            expected = self._expected(sample)
            if differs or expected is None:
                self._reporter.add(skipped(case, differs or "the trainer held other weights than it saved"))
                continue
            drawn = self._draw(checkpoint, sample, PREVIEW_EXACT)
            if drawn is None:
                self._reporter.add(skipped(case, f"{sample.facts['checkpoint']} was deleted"))
                continue
            latents, image = drawn
            if count == 0 and not torch.equal(latents, expected):
                differs = "this CPU sums a bf16 product in another order than the one that recorded"
                rel, _ = distance(latents, expected)
                self._reporter.add(skipped(case, f"{differs}; {rel:.3g} from the recorded latents"))
                continue
            self._reporter.add(identical(case, latents, expected))
            if expected is sample.latents:
                same = _as_jpeg(image) == sample.file.read_bytes()
                outcome = Outcome.PASS if same else Outcome.FAIL
                self._reporter.add(Result(f"{self._name}/{sample.label} jpeg", outcome, tolerance="exact"))

    def _expected(self, sample: _Sample) -> Tensor | None:
        """What the saved adapter gives bit for bit, where that was recorded."""
        if self._is_held or sample.step == 0:
            return sample.latents
        return self._vectors.tensors.get(f"{sample.step:09d}.{sample.facts['index']}.from_file.latents")

    def _redraw(self, checkpoint: Checkpoint, sample: _Sample) -> float | None:
        """Draws a sample in the `preview` profile. Returns how near its JPEG is to the trainer's, in dB."""
        case = f"{self._name}/{sample.label} fused"
        drawn = self._draw(checkpoint, sample, PREVIEW)
        if drawn is None:
            self._reporter.add(skipped(case, f"{sample.facts['checkpoint']} was deleted"))
            return None
        latents, image = drawn
        rel, max_abs = distance(latents, sample.latents)
        decibels = _psnr(_pixels(io.BytesIO(_as_jpeg(image))), _pixels(sample.file))
        outcome = Outcome.PASS if decibels >= MIN_PSNR_DB else Outcome.FAIL
        note = f"{decibels:.1f} dB from the trainer's file"
        self._reporter.add(Result(case, outcome, rel, max_abs, f"{MIN_PSNR_DB:g} dB", note))
        return decibels


def _load(device: torch.device, dtype: torch.dtype) -> Checkpoint:
    files = CheckpointFiles(
        transformer=MINI / "chroma-mini.safetensors",
        text_encoder=MINI / "text_encoder_2",
        tokenizer=MINI / "tokenizer_2",
        vae=MINI / "vae",
    )
    return Checkpoint.load(files, device=device, dtype=dtype)


def _as_jpeg(image: Image.Image) -> bytes:
    """As the trainer writes it: Pillow's defaults."""
    written = io.BytesIO()
    image.save(written, "JPEG")
    return written.getvalue()


def _pixels(source: Path | io.BytesIO) -> npt.NDArray[np.float64]:
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def _psnr(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio in dB; 99 where the images are the same."""
    if one.shape != other.shape:
        return 0.0
    error = float(np.mean((one - other) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255.0**2 / error))
