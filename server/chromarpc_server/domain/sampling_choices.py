"""Samplers, schedules and settings by name: what a request may say, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

FLOWMATCH = "flowmatch"
"""The reference's sampler, and its schedule: flow-match Euler, shifted by the image's size. ai-toolkit's name."""
SHIFT_RANGE = (0.01, 100.0)
"""Of `shift`. The least is ComfyUI's smallest above 0; far below it, noise levels are no numbers in float32."""
GUIDANCE_THRESHOLD = 1.00001
"""At or below it a single conditional pass is made, as in the reference."""


class DrawingSettings(StrEnum):
    """Whose way of drawing is followed where programs differ."""

    REFERENCE = "reference"
    COMFYUI = "comfyui"
    """Text without padding, prompt weights, float32 latents, noise and timesteps, truncated pixels, and no float8
    rounding of weights that the file did not have."""


def has_guidance(guidance_scale: float, settings: DrawingSettings) -> bool:
    """Whether each step makes an unconditional pass, too.

    The reference makes none at 1 and below, ComfyUI at 1 alone: below, it moves towards the unconditional image.
    """
    if settings is DrawingSettings.COMFYUI:
        return not math.isclose(guidance_scale, 1.0)
    return guidance_scale > GUIDANCE_THRESHOLD


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

UNUSUAL_SCHEDULES = frozenset({"karras", "exponential"})
"""Made for other kinds of models: on one of flows most of their steps fall where little is left to draw."""
SCHEDULES_WITHOUT_SHIFT = frozenset({"linear_quadratic"})
"""Schedules that the shift does not change, since they use none of the model's noise levels but the highest."""
LEAST_STEPS: Mapping[str, int] = MappingProxyType({"kl_optimal": 2})
"""Of schedules that cannot be computed for fewer."""

_FRESH_NOISE = (
    "draws fresh noise at every step, from a generator that depends on program and device, so its pictures cannot "
    "be drawn again"
)
_CFG_PP = "needs another kind of guidance (CFG++), which is not built"
_OWN_STEPS = "chooses its steps by itself, so neither steps nor schedule would count"
UNSUPPORTED_SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "euler_ancestral",
                "dpm_2_ancestral",
                "dpmpp_2s_ancestral",
                "dpmpp_sde",
                "dpmpp_sde_gpu",
                "dpmpp_2m_sde",
                "dpmpp_2m_sde_gpu",
                "dpmpp_2m_sde_heun",
                "dpmpp_2m_sde_heun_gpu",
                "dpmpp_3m_sde",
                "dpmpp_3m_sde_gpu",
                "ddpm",
                "lcm",
                "res_multistep_ancestral",
                "exp_heun_2_x0_sde",
                "er_sde",
                "seeds_2",
                "seeds_3",
                "sa_solver",
                "sa_solver_pece",
            ),
            _FRESH_NOISE,
        ),
        **dict.fromkeys(
            (
                "euler_cfg_pp",
                "euler_ancestral_cfg_pp",
                "dpmpp_2s_ancestral_cfg_pp",
                "dpmpp_2m_cfg_pp",
                "res_multistep_cfg_pp",
                "res_multistep_ancestral_cfg_pp",
                "gradient_estimation_cfg_pp",
            ),
            _CFG_PP,
        ),
        **dict.fromkeys(("dpm_fast", "dpm_adaptive"), _OWN_STEPS),
        "exp_heun_2_x0": "is not built",
    }
)
"""ComfyUI's others, by its names, and why they are refused."""
