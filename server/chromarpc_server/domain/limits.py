"""Limits of the service itself, beside those of the reference's schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused, naming the field."""

    max_prompts: int = 64
    max_prompt_bytes: int = 64 * 1024
    """UTF-8 bytes of one prompt after `[trigger]` is replaced."""
    max_loras: int = 8
    max_pixel_steps: int = 2**31
    """Width × height × calls of the model, summed over the prompts."""
    max_pixels: int = 2**27
    """Width × height, summed over the prompts: bounds what a job's finished images can weigh."""
    max_queued_jobs: int = 32
    max_request_bytes: int = 8 * 1024 * 1024
    max_streams: int = 4096
    """Calls in progress at once, of all callers."""
    max_calls_per_minute_per_peer: int = 24_000
    """Calls begun by all callers at one address."""


@dataclass(frozen=True)
class CallerLimits:
    """What one caller may have at once; more is refused, naming the quota."""

    max_streams: int = 1024
    """Calls in progress, streams and single answers alike."""
    max_queued_jobs: int = 32
    max_pixel_steps: int = 2**31
    """Width × height × calls of the model, summed over one request's prompts."""
    max_upload_bytes: int = 32 * 1024**3
    """Of the adapters it has uploaded, and of what its unfinished uploads will become."""
    max_calls_per_minute: int = 12_000


@dataclass(frozen=True)
class JobRetention:
    """How long jobs that ended, and their images, can be asked for."""

    keep_s: float = 24 * 3600.0
    keep_bytes: int = 10 * 1024**3
    """Of images and events; the newest job is kept in any case."""
    keep_jobs: int = 100_000


@dataclass(frozen=True)
class RestartLimits:
    """What becomes of jobs whose server, or whose caller, went away."""

    max_attempts: int = 2
    """How often a job may be begun."""
    reattach_s: float = 60.0
    """How long a job that ends with its caller waits for the caller to come back: after a restart, and after a
    lost connection where the request has an id."""


@dataclass(frozen=True)
class DeviceTimeouts:
    """How long the device may take before it is taken to hang."""

    step_s: float = 600.0
    """One denoising step; longer only where a longer one is expected."""
    step_factor: float = 10.0
    """How many times its expected time a step may take."""
    other_s: float = 1800.0
    """Anything else without a sign of life: reading weights, compiling, decoding."""


@dataclass(frozen=True)
class UploadLimits:
    """What uploads of adapters may take."""

    max_file_bytes: int = 4 * 1024**3
    """Of one adapter; 0 takes none."""
    max_total_bytes: int = 32 * 1024**3
    """Of uploaded adapters, and of what unfinished uploads will become."""
    max_chunk_bytes: int = 1024**2
    max_open: int = 8
    """Unfinished uploads of one caller."""
    max_open_in_all: int = 64
    expiry_s: float = 3600.0
    """Without bytes, after which an unfinished upload is dropped."""


@dataclass(frozen=True)
class DownloadLimits:
    """What one download may take, and all of them together."""

    file_bytes: int = 4 * 1024**3
    cache_bytes: int = 32 * 1024**3
    """Of the folder, but for files in use; a download in progress comes on top."""
    connect_s: float = 10.0
    """For each address tried, and again for TLS."""
    read_s: float = 30.0
    """The longest silence within an answer."""
    total_s: float = 900.0
    """From the first byte sent to the file's place in the folder, retries included."""
    backoff_s: float = 1.0
    """Before the second try; twice that before the third."""


MasterPlace = Literal["auto", "device", "host"]
"""Where a checkpoint's master weights stay."""


WeightsPlace = Literal["auto", "dequantized", "float8"]
"""How the transformer's weights are held on a GPU."""
Tiling = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class MemoryChoice:
    """What an operator decides about a GPU's memory; `auto` leaves it to the planner."""

    device_bytes: int | None = None
    """The most to use; all there is if None."""
    weights: WeightsPlace = "auto"
    text_encoder: MasterPlace = "auto"
    master: MasterPlace = "auto"
    tiling: Tiling = "auto"
    streaming: bool = True
    """Whether blocks may be streamed: not for a model beside others, which rather leave."""


@dataclass(frozen=True)
class Budgets:
    """How much may be resident."""

    max_checkpoints: int = 2
    prepared_bytes: int | None = None
    """Of prepared weights together, one always allowed; None leaves it to the device's memory."""
    adapter_bytes: int = 2 * 1024**3
    """Of parsed adapters in host memory."""
    memory: MemoryChoice = MemoryChoice()
