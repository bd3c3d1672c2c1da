"""Samplers, schedules and settings by name: what a request may say, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

FLOWMATCH = "flowmatch"
"""The reference's sampler, and its schedule: flow-match Euler, shifted by the image's size. ai-toolkit's name."""
SHIFT_RANGE = (0.0, 100.0)
"""Of `shift`: more than the first, at most the second."""


class DrawingSettings(StrEnum):
    """Whose way of drawing is followed where programs differ."""

    REFERENCE = "reference"
    COMFYUI = "comfyui"
    """Text without padding, prompt weights, float32 latents, noise and timesteps, truncated pixels, and no float8
    rounding of weights that the file did not have."""


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler that requests may name."""

    name: str
    calls_per_step: int = 1
    """How often it calls the model in a step, at most: what a step costs."""


SAMPLERS: Mapping[str, SamplerChoice] = MappingProxyType(
    {
        choice.name: choice
        for choice in (
            SamplerChoice(FLOWMATCH),
            SamplerChoice("euler"),
            SamplerChoice("heun", 2),
            SamplerChoice("heunpp2", 3),
            SamplerChoice("dpm_2", 2),
            SamplerChoice("lms"),
            SamplerChoice("dpmpp_2m"),
            SamplerChoice("ipndm"),
            SamplerChoice("ipndm_v"),
            SamplerChoice("deis"),
            SamplerChoice("res_multistep"),
            SamplerChoice("gradient_estimation"),
            SamplerChoice("ddim"),
            SamplerChoice("uni_pc"),
            SamplerChoice("uni_pc_bh2"),
        )
    }
)
"""By name. All but the reference's are ComfyUI's, by its names, and deterministic."""

SCHEDULES = (
    FLOWMATCH,
    "simple",
    "beta",
    "normal",
    "sgm_uniform",
    "ddim_uniform",
    "kl_optimal",
    "linear_quadratic",
    "karras",
    "exponential",
)
"""All but the reference's are ComfyUI's, by its names."""

COMFYUI_SAMPLER, COMFYUI_SCHEDULE = "euler", "simple"
"""What the settings `comfyui` draw with where neither the request nor the model says."""
