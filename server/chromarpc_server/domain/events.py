"""What can happen to a job, as immutable values; the wire's `JobEvent` carries the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.plan import Plan, PlanWarning


@dataclass(frozen=True)
class Accepted:
    """The request was understood and admitted; always first."""

    job_id: str
    plan: Plan


@dataclass(frozen=True)
class Restarted:
    """The job is run again from its beginning: the server was stopped, or the job's device was lost."""

    attempt: int
    """The one that is to come, from 1."""
    moved_from: str = ""
    """Id of the device that was lost or hung; empty after a restart of the server."""
    bits_may_differ: bool = False
    """Whether a device of another model goes on, so that images may differ by roundings."""


@dataclass(frozen=True)
class Queued:
    """The job waits; `position` 1 is next."""

    position: int
    estimated_wait_s: float | None


class LoadingStage(StrEnum):
    """What is being done before denoising can start."""

    DOWNLOADING = "downloading"
    READING = "reading"
    MERGING = "merging"
    QUANTIZING = "quantizing"
    COMPILING = "compiling"


@dataclass(frozen=True)
class Loading:
    """Weights or adapters are being made ready."""

    stage: LoadingStage
    done_bytes: int
    total_bytes: int

    @property
    def fraction(self) -> float:
        """How much of the stage is done, 0 to 1; 0 where nobody knows how much there is."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


class AdapterPlacement(StrEnum):
    """Where an adapter's change is computed."""

    MERGED = "merged"
    """It was merged into the weights."""
    BESIDE = "beside"
    """Beside the weights, which stay as they are."""


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter file turned out to be."""

    path: str
    sha256: str
    format: str
    network_multiplier: float
    rank: int
    matched_keys: int
    unmatched_keys: tuple[str, ...]
    metadata: Mapping[str, str]
    placement: AdapterPlacement = AdapterPlacement.MERGED


@dataclass(frozen=True)
class TokenCount:
    """How a prompt was tokenized."""

    used: int
    cut: int


class WeightsSource(StrEnum):
    """Where a job's weights came from."""

    RESIDENT = "resident"
    SWITCHED = "switched"
    BUILT = "built"


@dataclass(frozen=True)
class WeightsReport:
    """What it took to have the weights with the job's adapters merged."""

    source: WeightsSource
    rewritten_tensors: int
    """Of the transformer; 0 where the set was resident."""
    duration_s: float
    resident_sets: int
    """Sets in memory now."""
    resident_bytes: int
    """Their size together."""
    evicted_sets: int = 0
    """Sets that made room for this one, by being switched or dropped."""


@dataclass(frozen=True)
class Prepared:
    """Everything is ready; denoising starts."""

    adapters: tuple[AdapterReport, ...]
    model_revision: str
    token_counts: tuple[TokenCount, ...]
    versions: Mapping[str, str]
    device: str
    """Its name: the model of the GPU or CPU."""
    weights: WeightsReport
    warnings: tuple[PlanWarning, ...]
    device_id: str = ""
    """Of the device that computes; of a pair, the pair's. Jobs that an earlier version stored have none."""
    second_device: str = ""
    """The card that computes the unconditional pass, where guidance is computed on two."""
    stored_as: str = ""
    """How the file of the model's weights stores them."""


@dataclass(frozen=True)
class Step:
    """One denoising step is done."""

    prompt_index: int
    step: int
    """From 1."""
    total_steps: int
    sigma: float
    timestep: float
    duration_s: float
    estimated_remaining_s: float | None
    sigmas: tuple[float, ...] = ()
    """The whole schedule; with the first step of an image only."""


@dataclass(frozen=True)
class Preview:
    """A small image of the predicted image."""

    prompt_index: int
    step: int
    media_type: str
    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class ImageHeader:
    """An image is ready; its chunks follow."""

    prompt_index: int
    media_type: str
    size_bytes: int
    width: int
    height: int
    sha256: str
    seed: int


@dataclass(frozen=True)
class ImageChunk:
    """A part of an image's bytes."""

    prompt_index: int
    offset_bytes: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage of a job took."""

    queued_s: float = 0.0
    loading_s: float = 0.0
    text_encoding_s: float = 0.0
    denoising_s: float = 0.0
    decoding_s: float = 0.0
    image_encoding_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Completed:
    """The job is done."""

    timings: Timings
    peak_memory_bytes: int
    image_count: int


@dataclass(frozen=True)
class Failed:
    """The job failed."""

    error: ChromaError


@dataclass(frozen=True)
class Cancelled:
    """The job was cancelled, or its deadline passed."""

    error: ChromaError


Event = (
    Accepted
    | Restarted
    | Queued
    | Loading
    | Prepared
    | Step
    | Preview
    | ImageHeader
    | ImageChunk
    | Completed
    | Failed
    | Cancelled
)

Terminal = Completed | Failed | Cancelled


def may_coalesce(event: Event) -> bool:
    """Whether a slow reader may miss this event: progress and previews, never facts or image bytes."""
    match event:
        case Queued() | Loading() | Preview():
            return True
        case Step(sigmas=sigmas):
            return not sigmas
        case _:
            return False
