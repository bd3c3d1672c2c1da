"""What a device is asked to do, and what it reports while it does it: values, no tensor, no job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.events import Event, ImageHeader, Timings
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import SetKey

Pixels = npt.NDArray[np.uint8]
"""(height, width, 3) uint8, RGB."""


@dataclass(frozen=True)
class RenderedImage:
    """A finished image as pixels, on its way from the device thread to the encoder."""

    prompt_index: int
    seed: int
    pixels: Pixels = field(repr=False)


@dataclass(frozen=True)
class RenderedPreview:
    """A preview as pixels, on its way from the device thread to the encoder."""

    prompt_index: int
    step: int
    pixels: Pixels = field(repr=False)


@dataclass(frozen=True)
class EncodedImage:
    """A finished image as its file, from a device on another machine."""

    header: ImageHeader
    data: bytes = field(repr=False)
    encoding_s: float


@dataclass(frozen=True)
class StageDone:
    """A stage that work has spent on the device; named as in `Timings`."""

    stage: str
    seconds: float
    ended_ns: int
    """Since the epoch."""
    prompt_index: int | None = None


Report = Event | RenderedImage | RenderedPreview | EncodedImage | StageDone
Emit = Callable[[Report], None]
"""Takes what work has to report."""


@dataclass(frozen=True)
class Work:
    """Images to draw: everything that the device thread needs, and nothing else of the job behind it."""

    id: str
    """What the log names it by."""
    plan: Plan
    model_files: CheckpointFiles
    adapter_files: tuple[AdapterFile, ...]
    """Where each of the plan's adapters lies."""
    cancellation: Cancellation

    @property
    def set_key(self) -> SetKey:
        """The prepared weights it needs."""
        return set_key(self.plan, self.adapter_files)


@dataclass(frozen=True)
class WorkDone:
    """What finished work took on the device."""

    timings: Timings
    peak_memory_bytes: int


def set_key(plan: Plan, adapter_files: tuple[AdapterFile, ...]) -> SetKey:
    """The prepared weights that a plan needs with its adapters in these files."""
    rounded = plan.settings is not DrawingSettings.COMFYUI
    return SetKey.of(plan.served_model, plan.profile, adapter_files, plan.loras, plan.trainer, rounded=rounded)
