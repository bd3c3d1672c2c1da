"""A generation request as the client sent it: nothing checked, nothing filled in.

`None` means "left out", which is not the same as zero or the empty string. The names are those of the
reference's HTTP API (`protos/chromarpc/v1/generation_service.proto` documents each).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from chromarpc_server.domain.trainer import LokrForm

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "loras.network_multiplier": (-2.0, 2.0),
        "prompts.width": (64, 4096),
        "prompts.height": (64, 4096),
        "prompts.guidance_scale": (0.0, 20.0),
        "prompts.sample_steps": (1, 150),
        "prompts.fps": (1, 120),
        "output.quality": (1, 100),
        "preview.every_n_steps": (0, 150),
        "preview.max_side_px": (16, 512),
    }
)
"""What numbers may be, both ends included; a field's path without list indices."""
MIN_SEED = -1
"""Draws one."""
RESOLUTIONS = ("Default",)
FRAMES = 1
"""Chroma draws single images."""


class ImageFormat(StrEnum):
    """File formats of finished images."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    JPEG_TRAINER = "jpeg-trainer"
    """As ai-toolkit writes its samples."""

    @property
    def media_type(self) -> str:
        """`image/png` and so on."""
        return "image/jpeg" if self is ImageFormat.JPEG_TRAINER else f"image/{self.value}"


class NoiseDraw(StrEnum):
    """How the initial noise is drawn from a seed; see docs/numerics.md."""

    FLOAT32 = "float32"
    LEGACY = "legacy"


@dataclass(frozen=True)
class LoraRequest:
    """One adapter."""

    path: str | None = None
    transformer: str | None = None
    network_multiplier: float | None = None
    expected_sha256: str | None = None


@dataclass(frozen=True)
class PromptRequest:
    """One image."""

    prompt: str | None = field(default=None, repr=False)
    trigger_word: str | None = field(default=None, repr=False)
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    sample_steps: int | None = None
    neg: str | None = field(default=None, repr=False)
    seed: int | None = None
    sampler: str | None = None
    num_frames: int | None = None
    fps: int | None = None
    resolution: str | None = None
    ctrl_img: str | None = field(default=None, repr=False)
    ctrl_img_1: str | None = field(default=None, repr=False)
    ctrl_img_2: str | None = field(default=None, repr=False)
    ctrl_img_3: str | None = field(default=None, repr=False)
    schedule: str | None = None
    shift: float | None = None
    use_neg: bool | None = None


@dataclass(frozen=True)
class OutputRequest:
    """How images are to be encoded."""

    format: ImageFormat | None = None
    quality: int | None = None
    picture_record: bool | None = None


@dataclass(frozen=True)
class PreviewRequest:
    """Whether previews are wanted."""

    every_n_steps: int = 0
    max_side_px: int | None = None


@dataclass(frozen=True)
class TrainerRequest:
    """What the trainer's config says, by its names."""

    quantize: bool | None = None
    qtype: str | None = None
    quantize_te: bool | None = None
    dtype: str | None = None
    lokr_form: LokrForm | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One request: a model, adapters and prompts."""

    model: str | None = None
    loras: tuple[LoraRequest, ...] = ()
    hf_token: str | None = field(default=None, repr=False)
    trigger_word: str | None = field(default=None, repr=False)
    prompts: tuple[PromptRequest, ...] = ()
    kv_cache: bool | None = None
    match_target_res: bool | None = None
    output: OutputRequest = OutputRequest()
    preview: PreviewRequest = PreviewRequest()
    profile: str | None = None
    noise_draw: NoiseDraw | None = None
    request_id: str | None = None
    detach: bool = False
    cancel_at_once: bool = False
    """Whether the caller's leaving ends the job without delay, although it has a request id."""
    max_queue_s: float | None = None
    trainer: TrainerRequest | None = None
    settings: str | None = None
    unknown_fields: tuple[str, ...] = ()
    """Values this version does not know: numbers of protobuf fields or enum values, with their paths."""
