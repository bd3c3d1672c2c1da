"""`preview/…/sampling`: whole runs from noise to pixels, as the trainer recorded them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from chromarpc_server.domain.trainer import trainer_size
from chromarpc_server.pipeline import sampling
from chromarpc_server.pipeline.models import autoencoder
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, trainer_arithmetic
from chromarpc_server.verify.preview_models import (
    CPU,
    FLOAT32_REL,
    Drawing,
    Model,
    draw,
    embed,
    padded,
    ratio,
    settings_of,
    text_encoder,
)
from chromarpc_server.verify.preview_vectors import PreviewVectors
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, identical, skipped, within
from chromarpc_server.verify.vectors import Vectors

NO_TRUTH_REL = 5e-2
"""Of latents that were recorded without a truth beside them."""
HEAVY_TOKENS_ON_CPU = 2048
IMAGE_MAX, ELSEWHERE_IMAGE_MAX = 1.0, 8.0
"""Of one value of an image decoded in float32, and in bf16 on another machine than theirs."""


class SamplingCases:
    """The runs of one folder."""

    def __init__(self, given: PreviewVectors, reporter: Reporter) -> None:
        self._given = given
        self._reporter = reporter

    def run(self) -> None:
        """All of them."""
        vectors, model = self._given.read("sampling"), Model.read(self._given.folder)
        runs = json.loads(vectors.metadata["runs"])
        runs = (
            dict(enumerate(runs)) if isinstance(runs, list) else {int(key): value for key, value in runs.items()}
        )
        for name, recorded in vectors.tensors.items():
            if not name.endswith(".latents"):
                continue
            key, _, number = name.removesuffix(".latents").rpartition(".")
            if key == "float32_adapter":
                held = Model.read(self._given.folder, "lora_float32.safetensors")
                self._sample(vectors, held, "qfloat8.bf16", runs, int(number), recorded, label=key)
            else:
                self._sample(vectors, model, key, runs, int(number), recorded, label=key)

    def _sample(
        self,
        vectors: Vectors,
        model: Model,
        key: str,
        runs: Mapping[int, dict[str, object]],
        number: int,
        recorded: Tensor,
        *,
        label: str,
    ) -> None:
        case = f"{self._given.kind}/sampling/{label}/{number}"
        qtype, _, dtype = key.partition(".")
        settings = settings_of(qtype, dtype or "bf16")
        width = TORCH_DTYPES[settings.dtype]
        tokens = recorded.shape[1]
        if self._given.device.type == "cpu" and tokens > HEAVY_TOKENS_ON_CPU:
            self._reporter.add(skipped(case, f"{tokens} image tokens are heavy on a CPU"))
            return
        drawing = self._drawing(vectors, key, runs[number], number)
        differs = self._given.differs
        truth = vectors.tensors.get(f"{key}.{number}.truth") if label == key else None
        if width == torch.float32:
            found = draw(
                model.exact(settings, drawing.multiplier, self._given.device), drawing, self._given.device, width
            )
            self._reporter.add(within(f"{case} exact", found, recorded, FLOAT32_REL))
        elif differs:
            self._reporter.add(skipped(f"{case} exact", differs))
            found = recorded
        else:
            found = draw(
                model.exact(settings, drawing.multiplier, self._given.device), drawing, self._given.device, width
            )
            self._reporter.add(identical(f"{case} exact", found, recorded))
        if label != key:
            return
        self._fused(case, model, drawing, key, recorded, truth)
        self._image(vectors, case, key, number, found, drawing)

    def _fused(
        self, case: str, model: Model, drawing: Drawing, key: str, recorded: Tensor, truth: Tensor | None
    ) -> None:
        """As it serves, as close to the truth as the trainer; on a CPU also without the trainer's rounding."""
        qtype, _, dtype = key.partition(".")
        settings = settings_of(qtype, dtype or "bf16")
        if self._given.device.type == "cuda" and settings.dtype == "bfloat16":
            fused = model.fused(settings, drawing.multiplier, self._given.device, torch.bfloat16)
            found = draw(fused, drawing, self._given.device, torch.bfloat16)
            if truth is not None:
                self._reporter.add(ratio(f"{case} fused", found, recorded, truth))
                return
        else:
            wide = model.fused(settings, drawing.multiplier, CPU, torch.float32, torch.float32)
            found = draw(wide, drawing, CPU, torch.float32)
            if truth is not None:
                self._reporter.add(within(f"{case} fused", found, truth, FLOAT32_REL, "float32, from the truth"))
                if settings.dtype == "bfloat16":
                    served = draw(
                        model.fused(settings, drawing.multiplier, CPU, torch.float32), drawing, CPU, torch.float32
                    )
                    self._reporter.add(ratio(f"{case} served", served, recorded, truth))
                return
        self._reporter.add(
            within(f"{case} fused", found, recorded, NO_TRUTH_REL, "from the recorded: no truth is")
        )

    def _drawing(self, vectors: Vectors, key: str, run: Mapping[str, object], number: int) -> Drawing:
        resolved = run.get("resolved", run)
        if not isinstance(resolved, dict):
            raise TypeError("a run that resolves to nothing")
        width, height = resolved.get("image") or [trainer_size(resolved[side]) for side in ("width", "height")]
        tensors = vectors.tensors
        if f"{key}.{number}.prompt_embeds" in tensors:
            texts = [padded(tensors[f"{key}.{number}.{what}_embeds"]) for what in ("prompt", "neg")]
        else:
            texts = [self._embedded(vectors, key, str(resolved[what])) for what in ("prompt", "negative_prompt")]
        return Drawing(
            width=width,
            height=height,
            steps=int(resolved["steps"] if "steps" in resolved else resolved["num_inference_steps"]),
            guidance_scale=float(resolved["guidance_scale"]),
            multiplier=float(resolved["network_multiplier"]),
            noise=tensors[f"{key}.{number}.noise"],
            embedding=PromptEmbedding(*texts[0], *texts[1]),
        )

    def _embedded(self, vectors: Vectors, key: str, prompt: str) -> tuple[Tensor, Tensor]:
        """A text's embeddings: as recorded, for the quantizer that they are of; else from its tokens."""
        index = json.loads(vectors.metadata["prompts"]).index(prompt)
        ids = vectors.tensors[f"text.{index}.input_ids"]
        mask = (ids != 0).long()
        settings = settings_of(key)
        if key == "qfloat8" or not self._given.has("t5"):
            return vectors.tensors[f"text.{index}.embeds"], mask
        encoder = text_encoder(self._given.read("t5"), settings, self._given.device)
        return embed(encoder, ids, settings).cpu(), mask

    def _image(
        self, vectors: Vectors, case: str, key: str, number: int, latents: Tensor, drawing: Drawing
    ) -> None:
        expected = vectors.tensors.get(f"{key}.{number}.image")
        if expected is None or not self._given.has("vae"):
            return
        settings = settings_of(*key.split("."))
        model = self._given.read("vae").autoencoder(self._given.device, TORCH_DTYPES[settings.dtype])
        unpacked = sampling.unpack(latents.to(self._given.device), drawing.width, drawing.height)
        with trainer_arithmetic(self._given.device, settings):
            pixels = autoencoder.to_pixels(autoencoder.decode(model, unpacked))
        differs = self._given.differs
        found = torch.from_numpy(pixels)
        rel, largest = distance(found, expected)
        allowed = IMAGE_MAX if settings.dtype == "float32" else ELSEWHERE_IMAGE_MAX if differs else 0.0
        outcome = Outcome.PASS if largest <= allowed else Outcome.FAIL
        self._reporter.add(Result(f"{case} image", outcome, rel, largest, f"max {allowed:g}"))
        recorded = vectors.tensors.get(f"jpeg.{number}")
        if recorded is not None and key == "qfloat8.bf16":
            written = io.BytesIO()
            Image.fromarray(expected.numpy()).save(written, "JPEG")
            same = written.getvalue() == recorded.numpy().tobytes()
            outcome = Outcome.PASS if same else Outcome.FAIL
            self._reporter.add(Result(f"{case} jpeg", outcome, tolerance="exact", note="of the recorded pixels"))
