"""Models of recorded weights, drawn with as the preview profiles draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters import Adapter, read_adapter
from chromarpc_server.pipeline.denoising import Text, VelocityMaker, denoise_from
from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding, build_text_encoder
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import PREVIEW, PREVIEW_EXACT
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.trainer.parts import encode_as_trainer
from chromarpc_server.pipeline.weights.quantizers import QuantizedLinear, quantize_linear
from chromarpc_server.pipeline.weights.stored import as_they_are
from chromarpc_server.verify.report import Outcome, Result, distance
from chromarpc_server.verify.vectors import Vectors

if TYPE_CHECKING:
    from transformers import T5EncoderModel

CPU = torch.device("cpu")
FLOAT32_REL = 1e-5
TEXT_TOKENS = 512
ERROR_RATIO = 1.10
"""`preview` may be this much further from the truth than the trainer's own output is."""


def settings_of(qtype: str, dtype: str = "bf16") -> TrainerSettings:
    """Of a case's name: `qfloat8`, or `none` for a model that is not quantized."""
    dtype = "float32" if dtype == "float32" else "bfloat16"
    if qtype == "none":
        return TrainerSettings(quantize=False, quantize_te=False, dtype=dtype)
    return TrainerSettings(qtype=qtype, dtype=dtype)


@dataclass(frozen=True)
class Drawing:
    """What one recorded run was asked for."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    multiplier: float
    noise: Tensor = field(repr=False)
    embedding: PromptEmbedding = field(repr=False)


@dataclass(frozen=True)
class Model:
    """A transformer's recorded weights and the adapter of its runs."""

    config: ChromaConfig
    tensors: Mapping[str, Tensor] = field(repr=False)
    adapter: Adapter | None

    @classmethod
    def read(cls, folder: Path, adapter: str = "lora.safetensors") -> Model:
        """From `transformer.safetensors` and, if it is there, the adapter beside it."""
        vectors = Vectors.read(folder / "transformer.safetensors")
        targets = {name: tuple(tensor.shape) for name, tensor in vectors.tensors.items()}
        path = folder / adapter
        return cls(
            vectors.chroma_config(), vectors.tensors, read_adapter(path, targets) if path.is_file() else None
        )

    def adapters(self, multiplier: float) -> list[tuple[Adapter, float]]:
        """The adapter at this multiplier."""
        return [] if self.adapter is None else [(self.adapter, multiplier)]

    def exact(self, settings: TrainerSettings, multiplier: float, device: torch.device) -> ExactPreview:
        """In the `preview-exact` profile."""
        model = ExactPreview(self.config, as_they_are(self.tensors), PREVIEW_EXACT, settings, device=device)
        model.switch(self.adapters(multiplier))
        return model

    def fused(
        self,
        settings: TrainerSettings,
        multiplier: float,
        device: torch.device,
        dtype: torch.dtype,
        modulation_dtype: torch.dtype | None = None,
    ) -> FusedPreview:
        """In the `preview` profile; modulations in the trainer's dtype, as it serves, unless another is given."""
        model = FusedPreview(
            self.config,
            as_they_are(self.tensors),
            PREVIEW,
            settings,
            DevicePlacement(device, dtype),
            modulation_dtype=modulation_dtype,
        )
        model.switch(self.adapters(multiplier))
        return model


def draw(model: ExactPreview | FusedPreview, drawing: Drawing, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Final latents, computed in `dtype` with timesteps rounded as the trainer rounds them."""
    rounding = TORCH_DTYPES[model.settings.dtype]
    *_, last = denoise_from(
        model,
        drawing.embedding,
        drawing.noise.to(device=device, dtype=dtype),
        drawing.width,
        drawing.height,
        drawing.steps,
        drawing.guidance_scale,
        timestep_dtype=rounding,
    )
    return last.latents.cpu()


def forward_once(
    vectors: Vectors,
    model: Model,
    run_name: str,
    number: str,
    *,
    exact: bool,
    dtype: torch.dtype | None = None,
    rounds: bool = True,
) -> Tensor:
    """One recorded case's velocity, on the CPU.

    Args:
        vectors: `forward`.
        model: whose.
        run_name: `QTYPE.DTYPE.MULTIPLIER`.
        number: of the case.
        exact: in the `preview-exact` profile, else in `preview`.
        dtype: to compute in, if another than the trainer's.
        rounds: whether `preview` rounds what it rounds as the trainer does.
    """
    qtype, name, multiplier = run_name.split(".", 2)
    settings = settings_of(qtype, name)
    # The recorded adapter is beside the weights whether they are quantized or not.
    if qtype == "none":
        settings = settings_of("uint8", name)
    width = dtype or TORCH_DTYPES[settings.dtype]
    case = vectors.of(number)
    if exact:
        made: VelocityMaker = model.exact(settings, float(multiplier), CPU)
    else:
        made = model.fused(settings, float(multiplier), CPU, width, None if rounds else width)
    text = Text(case["txt"].to(width), case["mask"])
    rounding = TORCH_DTYPES[settings.dtype]
    timestep = case["timestep"].to(rounding).to(width) / 1000
    grid = (int(case["grid"][0]), int(case["grid"][1]))
    with torch.inference_mode():
        velocity = made.velocity([text], timestep, grid)
        found, _ = velocity(case["img"].to(width), 0)
    return found


def padded(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings that were cut to the tokens that are attended, at full length, and the mask of the real ones.

    (1, real + 1, context) → (1, 512, context) and (1, 512).
    """
    count = embeds.shape[1]
    whole = torch.zeros(1, TEXT_TOKENS, embeds.shape[2], dtype=embeds.dtype)
    whole[:, :count] = embeds
    return whole, (torch.arange(TEXT_TOKENS)[None] < count - 1).long()


def text_encoder(vectors: Vectors, settings: TrainerSettings, device: torch.device) -> T5EncoderModel:
    """The recorded encoder as the trainer quantizes it."""
    dtype = TORCH_DTYPES[settings.dtype]
    qtype = settings.qtype if settings.quantize_te else None

    def quantize(_: str, weight: Tensor) -> QuantizedLinear:
        return quantize_linear(weight, qtype)

    return build_text_encoder(
        libraries().t5_config(**vectors.config),
        {name: tensor.to(dtype) for name, tensor in vectors.tensors.items()},
        device=device,
        dtype=dtype,
        quantize=True,
        quantizer=quantize,
        attention="sdpa" if device.type == "cuda" else "eager",
    )


def embed(model: T5EncoderModel, ids: Tensor, settings: TrainerSettings) -> Tensor:
    """(1, 512) → (1, 512, context)."""
    return encode_as_trainer(model, ids, settings)


def ratio(case: str, found: Tensor, recorded: Tensor, truth: Tensor) -> Result:
    """Passes where `found` is at most 1.10 × as far from the truth as the trainer's own output."""
    own, _ = distance(recorded, truth)
    rel, max_abs = distance(found, truth)
    outcome = Outcome.PASS if rel <= ERROR_RATIO * own else Outcome.FAIL
    tolerance = f"{ERROR_RATIO:.2f} × the trainer's {own:.3g}"
    return Result(case, outcome, rel, max_abs, tolerance, f"ratio {rel / own:.3f}" if own else "")


def base_version(version: str) -> str:
    """A torch version without its build: `2.11.0` of `2.11.0+cu130`."""
    return version.partition("+")[0]


def named(results: Iterable[Result], prefix: str) -> list[Result]:
    """The same results under longer names."""
    return [replace(result, case=f"{prefix}/{result.case}") for result in results]
