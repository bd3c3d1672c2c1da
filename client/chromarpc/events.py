"""What happens to a generation, as typed values: the order they come in, what each one carries.

Accepted, Queued*, Loading*, Prepared, then for each prompt Step*, Preview*, ImageReady, and Completed last;
Heartbeat whenever nothing else was said for a while. A generation that fails or is cancelled raises instead
(see `chromarpc.errors`), so `Completed` is the only last event. `Restarted` makes what came before it void, but
for `Accepted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, TypeAlias

from chromarpc.images import GeneratedImage
from chromarpc.sampling import FLOWMATCH, REFERENCE

ImageFormat: TypeAlias = Literal["png", "jpeg", "webp", "jpeg-trainer"]
"""How finished images are encoded; `jpeg-trainer` as ai-toolkit writes its samples."""
NoiseDraw: TypeAlias = Literal["float32", "legacy"]
"""What a seed means: today's draw, or that of torch up to 2.11 for LoRAs whose previews are older."""
LokrForm: TypeAlias = Literal["factorized", "weight"]
"""How a LoKr is added: beside the product by its factors, or, as before 2026-07-15, to the dequantized weight."""


class LoadingStage(StrEnum):
    """What is being done before denoising can start."""

    UNKNOWN = "unknown"
    """A stage that this version of the client does not know."""
    DOWNLOADING = "downloading"
    READING = "reading"
    MERGING = "merging"
    QUANTIZING = "quantizing"
    COMPILING = "compiling"


@dataclass(frozen=True, kw_only=True)
class JobWarning:
    """Something to know that did not stop the job."""

    code: str
    """Stable name, such as `SIZE_SNAPPED`."""
    field: str
    """Dotted path of the field it is about, such as `prompts.0.width`; may be empty."""
    message: str
    """A sentence for people."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """What ai-toolkit's training config decides about its samples; None leaves it to the server's default."""

    quantize: bool | None = None
    """`model.quantize`: whether the transformer is quantized."""
    qtype: str | None = None
    """`model.qtype`: the quantizer, such as `qfloat8`."""
    quantize_te: bool | None = None
    """`model.quantize_te`: whether the text encoder is quantized; as `quantize` where nobody says."""
    dtype: str | None = None
    """`train.dtype`: `bf16` or `float32`."""
    lokr_form: LokrForm | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedPrompt:
    """One image to draw, with nothing left open."""

    prompt: str
    """After `[trigger]` was replaced."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    sample_steps: int
    guidance_scale: float
    seed: int
    neg: str = ""
    """Negative prompt, where it is honoured."""
    sampler: str = FLOWMATCH
    schedule: str = FLOWMATCH
    shift: float | None = None
    """Fixed shift of the schedule; None where the schedule has its own."""


@dataclass(frozen=True, kw_only=True)
class PlannedLora:
    """One adapter, with nothing left open."""

    path: str
    network_multiplier: float
    expected_sha256: str | None = None
    """What the file must be, where the request says so."""


class AdapterPlacement(StrEnum):
    """Where an adapter's change is computed."""

    MERGED = "merged"
    """It was merged into the weights."""
    BESIDE = "beside"
    """Beside the weights, which stay as they are."""
    UNKNOWN = "unknown"
    """Not told, or another one, of a newer or an older server."""


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an adapter file turned out to be."""

    path: str
    sha256: str
    """Of the file, hexadecimal."""
    format: str
    """Name of the recognised format."""
    network_multiplier: float
    rank: int
    """Of its low-rank pairs; the largest where they differ; 0 where it has none."""
    matched_key_count: int
    unmatched_key_count: int
    unmatched_keys: tuple[str, ...]
    """The first 20."""
    metadata: Mapping[str, str]
    """The file's own header (name, trainer, step), shortened."""
    placement: AdapterPlacement = AdapterPlacement.UNKNOWN


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """How a prompt was tokenized."""

    used: int
    """Tokens the text encoder sees, with the end mark."""
    cut: int
    """Tokens cut off because they exceed the model's 512."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long each stage of a job took, in seconds."""

    queued_s: float
    loading_s: float
    text_encoding_s: float
    denoising_s: float
    decoding_s: float
    image_encoding_s: float
    total_s: float
    """From admission to the end."""


@dataclass(frozen=True, kw_only=True)
class _Event:
    sequence: int
    """Position in the job's log, from 1; gaps mean that progress was left out for a slow reader."""
    time: datetime
    """When it happened, by the server's clock, in UTC."""


@dataclass(frozen=True, kw_only=True)
class Accepted(_Event):
    """The request as it will be run, every default filled in: always the first event."""

    job_id: str
    model: str
    """Id that was asked for."""
    served_model: str
    """Id that serves it: another one where the server has an alias."""
    profile: str
    """Numerics profile."""
    noise_draw: NoiseDraw
    prompts: tuple[PlannedPrompt, ...]
    loras: tuple[PlannedLora, ...]
    output_format: ImageFormat
    output_quality: int | None
    """Of JPEG and WebP, 1 to 100; None for PNG and the trainer's JPEG."""
    warnings: tuple[JobWarning, ...]
    """Those known so far; more may come with `Prepared`."""
    picture_record: bool = True
    """Whether each picture carries what it was drawn with."""
    trainer: TrainerOptions | None = None
    """What the trainer's config decides, where the profile takes it."""
    settings: str = REFERENCE
    """Whose way of drawing is followed: `reference` or `comfyui`."""


@dataclass(frozen=True, kw_only=True)
class Queued(_Event):
    """The job waits; again whenever its position changes."""

    position: int
    """1 is next."""
    estimated_wait_s: float | None
    """None while the server has measured nothing."""


@dataclass(frozen=True, kw_only=True)
class Loading(_Event):
    """Weights or adapters are being made ready."""

    stage: LoadingStage
    fraction: float
    """How much of the stage is done, 0 to 1."""
    done_bytes: int
    total_bytes: int


class WeightsSource(StrEnum):
    """Where a job's weights came from."""

    RESIDENT = "resident"
    """They were in memory with these adapters merged."""
    SWITCHED = "switched"
    """Weights in memory were switched to these adapters in place."""
    BUILT = "built"
    """They were made anew from the checkpoint."""
    UNKNOWN = "unknown"
    """Another one, of a newer or an older server."""


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What it took to have the weights with the job's adapters merged."""

    source: WeightsSource
    rewritten_tensor_count: int
    """Of the transformer; 0 where the set was in memory."""
    duration_s: float
    resident_set_count: int
    """Adapter sets in memory now."""
    resident_bytes: int
    """Their size together."""
    evicted_set_count: int
    """Sets that made room for this one, by being switched or dropped."""


@dataclass(frozen=True, kw_only=True)
class Prepared(_Event):
    """Everything is ready; denoising starts."""

    adapters: tuple[AdapterReport, ...]
    model_revision: str
    """Content hash of the model's weights, hexadecimal."""
    token_counts: tuple[TokenCount, ...]
    """One for each prompt."""
    versions: Mapping[str, str]
    """Of everything that the numbers depend on: `torch`, `diffusers`, `transformers`, `chromarpc`."""
    device: str
    """Name of the device that computes: the model of the GPU or CPU."""
    weights: WeightsReport
    warnings: tuple[JobWarning, ...]
    """Those that needed files or the tokenizer, such as `PROMPT_TRUNCATED`."""
    device_id: str = ""
    """Id of the device, as `server_info` lists it; of a pair, the pair's; empty from an older server."""
    second_device: str = ""
    """The card that computes the unconditional pass, such as `cuda:1`, where guidance is computed on two."""
    stored_as: str = ""
    """How the file of the model's weights stores them, such as `fp8 scaled`; empty from an older server."""


@dataclass(frozen=True, kw_only=True)
class Step(_Event):
    """One denoising step is done."""

    prompt_index: int
    step: int
    """From 1."""
    total_steps: int
    """Of this image."""
    sigma: float
    """Noise level the step started from."""
    timestep: float
    """As the transformer saw it, 0 to 1000."""
    duration_s: float
    estimated_remaining_s: float | None
    """For the rest of the job, not of this image alone."""
    sigmas: tuple[float, ...]
    """The whole schedule, `total_steps` + 1 values, with the first step of an image; empty afterwards."""


@dataclass(frozen=True, kw_only=True)
class Preview(_Event):
    """A small picture of what the model predicts the finished image to be."""

    prompt_index: int
    step: int
    """The step after which it was taken, from 1."""
    media_type: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    data: bytes
    """The encoded picture."""


@dataclass(frozen=True, kw_only=True)
class ImageReady(_Event):
    """An image has arrived whole, its length and SHA-256 as announced."""

    prompt_index: int
    image: GeneratedImage


@dataclass(frozen=True, kw_only=True)
class Completed(_Event):
    """The job is done: the last event."""

    timings: Timings
    peak_memory_bytes: int
    """Most device memory in use at once; host memory of the process where the device is a CPU."""
    image_count: int


@dataclass(frozen=True, kw_only=True)
class Heartbeat(_Event):
    """Nothing happened for a while; the job is alive. Repeats the sequence of the event before it."""


@dataclass(frozen=True, kw_only=True)
class Restarted(_Event):
    """The server was stopped, or the job's device lost: the job runs again from step 1, and images come again."""

    attempt: int
    """The one that is to come, from 1."""
    moved_from: str = ""
    """Id of the device that was lost or hung; empty where the server itself was restarted."""
    bits_may_differ: bool = False
    """Whether the job goes on on a device of another model, so that images may differ by roundings."""


Event: TypeAlias = (
    Accepted | Queued | Loading | Prepared | Step | Preview | ImageReady | Completed | Heartbeat | Restarted
)
"""Anything that `generate` yields."""
