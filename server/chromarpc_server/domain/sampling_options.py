"""Sampler, schedule, shift and settings of a request: what is filled in, and what cannot be honoured."""

from __future__ import annotations

from dataclasses import dataclass

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.findings import Findings
from chromarpc_server.domain.models import ModelDefaults
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.requests import NoiseDraw, PromptRequest
from chromarpc_server.domain.sampling_choices import (
    COMFYUI_SAMPLER,
    COMFYUI_SCHEDULE,
    FLOWMATCH,
    LEAST_STEPS,
    SAMPLERS,
    SCHEDULES,
    SCHEDULES_WITHOUT_SHIFT,
    SHIFT_RANGE,
    UNSUPPORTED_SAMPLERS,
    UNUSUAL_SCHEDULES,
    DrawingSettings,
)
from chromarpc_server.domain.trainer import PREVIEW_PROFILES
from chromarpc_server.domain.warning_codes import WarningCode

COMFYUI_PROFILES = ("reference", "fp8")
"""Numerics profiles that can follow ComfyUI. The others promise another program's own sequence of operations."""


@dataclass(frozen=True)
class Sampling:
    """How one image is sampled."""

    sampler: str
    schedule: str
    shift: float | None


def resolve_settings(
    asked: str | None, profile: str, noise_draw: NoiseDraw | None, found: Findings
) -> DrawingSettings:
    """Whose way of drawing is followed.

    Args:
        asked: what the request says.
        profile: the request's numerics profile.
        noise_draw: what the request says of its noise.
        found: collects what cannot be honoured.
    """
    if not asked:
        return DrawingSettings.REFERENCE
    if asked not in [*DrawingSettings]:
        found.refuse("settings", f"no such settings: {asked[:64]!r}; known are {', '.join(DrawingSettings)}")
        return DrawingSettings.REFERENCE
    settings = DrawingSettings(asked)
    if settings is DrawingSettings.COMFYUI:
        if profile not in COMFYUI_PROFILES:
            found.refuse(
                "settings",
                f"the profile {profile} cannot draw as ComfyUI does: give the profile "
                f"{' or '.join(COMFYUI_PROFILES)}, or leave the settings out",
            )
        if noise_draw is NoiseDraw.LEGACY:
            found.refuse(
                "noise_draw", "ComfyUI's noise is drawn in float32: leave it out with the settings comfyui"
            )
    return settings


def resolve_sampling(
    asked: PromptRequest,
    at: str,
    defaults: ModelDefaults,
    profile: str,
    settings: DrawingSettings,
    found: Findings,
) -> Sampling:
    """How an image is sampled; but for the profiles that draw the trainer's own, which sample in one way.

    What the request leaves out is the model's default. Where that is the reference's, the settings `comfyui` have
    defaults of their own. A model's shift goes with its schedule: a request that names a schedule, be it the
    model's, and no shift gets the schedule's own.

    Args:
        asked: what the request says of the image.
        at: path of the prompt.
        defaults: the model's.
        profile: the request's numerics profile.
        settings: the request's, resolved.
        found: collects what cannot be honoured, and what has no effect.
    """
    if profile in PREVIEW_PROFILES:
        _refuse_what_no_trainer_has(asked, at, profile, found)
        return Sampling(FLOWMATCH, FLOWMATCH, None)
    is_comfyui = settings is DrawingSettings.COMFYUI
    usual = defaults.schedule
    if is_comfyui and usual == FLOWMATCH:
        usual = COMFYUI_SCHEDULE
    default_sampler = COMFYUI_SAMPLER if is_comfyui and defaults.sampler == FLOWMATCH else defaults.sampler
    sampler = _known_sampler(asked.sampler, at, found) if asked.sampler else default_sampler
    schedule = _known_schedule(asked.schedule, at, found) if asked.schedule else usual
    shift = _shift(asked.shift, schedule, None if asked.schedule else defaults.shift, at, found)
    return Sampling(sampler, schedule, shift)


def require_known_sampling(plan: Plan) -> None:
    """Makes sure that a plan which another version may have stored can be drawn by this one.

    Raises:
        InvalidParameter: a sampler or schedule of it is not known here.
    """
    for index, prompt in enumerate(plan.prompts):
        if prompt.sampler not in SAMPLERS:
            raise InvalidParameter(
                f"this server does not know the sampler {prompt.sampler}", field=f"prompts.{index}.sampler"
            )
        if prompt.schedule not in SCHEDULES:
            raise InvalidParameter(
                f"this server does not know the schedule {prompt.schedule}", field=f"prompts.{index}.schedule"
            )


def refuse_too_few_steps(sample_steps: int, schedule: str, at: str, found: Findings) -> None:
    """Refuses fewer steps than a schedule can be computed for."""
    least = LEAST_STEPS.get(schedule, 1)
    if 0 < sample_steps < least:
        found.refuse(
            f"{at}.sample_steps", f"the schedule {schedule} needs {least} steps or more, got {sample_steps}"
        )


def _known_sampler(name: str, at: str, found: Findings) -> str:
    if name not in SAMPLERS:
        reason = UNSUPPORTED_SAMPLERS.get(name)
        problem = f"no such sampler: {name[:64]!r}" if reason is None else f"{name} {reason}"
        found.refuse(f"{at}.sampler", f"{problem}; give one of {', '.join(SAMPLERS)}")
    return name


def _known_schedule(name: str, at: str, found: Findings) -> str:
    if name not in SCHEDULES:
        found.refuse(f"{at}.schedule", f"no such schedule: {name[:64]!r}; give one of {', '.join(SCHEDULES)}")
    elif name in UNUSUAL_SCHEDULES:
        found.warn(
            WarningCode.SCHEDULE_UNUSUAL,
            f"{at}.schedule",
            f"{name} was made for other kinds of models: here most of its steps fall where little noise is left",
        )
    return name


def _shift(asked: float | None, schedule: str, default: float | None, at: str, found: Findings) -> float | None:
    shift = default if asked is None else asked
    low, high = SHIFT_RANGE
    if shift is not None and not low <= shift <= high:  # NaN fails both comparisons
        found.refuse(f"{at}.shift", f"must be between {low:g} and {high:g}, got {shift}")
    if schedule not in SCHEDULES_WITHOUT_SHIFT:
        return shift
    if asked is not None:
        found.warn(
            WarningCode.SHIFT_IGNORED,
            f"{at}.shift",
            f"the schedule {schedule} has no shift, so this has no effect",
        )
    return None


def _refuse_what_no_trainer_has(asked: PromptRequest, at: str, profile: str, found: Findings) -> None:
    advice = "leave it out, or use the profile reference"
    for name in ("sampler", "schedule"):
        value = getattr(asked, name)
        if value and value != FLOWMATCH:
            found.refuse(
                f"{at}.{name}",
                f"the profile {profile} draws the trainer's image, with {FLOWMATCH} alone: {advice}",
            )
    if asked.shift is not None:
        found.refuse(
            f"{at}.shift", f"the profile {profile} draws the trainer's image, which has no fixed shift: {advice}"
        )
