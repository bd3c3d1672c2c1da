"""Prompts of a request: triggers, sizes, seeds, negative text. `resolve` puts them together with the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chromarpc_server.domain.findings import Findings
from chromarpc_server.domain.limits import Limits
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import PlannedPrompt
from chromarpc_server.domain.prompt_weights import names_embedding
from chromarpc_server.domain.requests import FRAMES, MIN_SEED, RESOLUTIONS, GenerationRequest, PromptRequest
from chromarpc_server.domain.sampling_choices import DrawingSettings, has_guidance
from chromarpc_server.domain.sampling_options import refuse_too_few_steps, resolve_sampling
from chromarpc_server.domain.trainer import (
    MIN_SIZE_PX,
    PREVIEW_PROFILES,
    SIZE_MULTIPLE,
    TRAINER_SIZES,
    trainer_size,
)
from chromarpc_server.domain.warning_codes import WarningCode

TRIGGER = "[trigger]"


@dataclass(frozen=True)
class PromptRules:
    """What every prompt of one request is judged by."""

    spec: ModelSpec
    divisor: int
    profile: str
    settings: DrawingSettings
    limits: Limits
    trigger_word: str | None
    draw_seed: Callable[[], int]

    @property
    def is_preview(self) -> bool:
        """Whether the trainer's own image is drawn."""
        return self.profile in PREVIEW_PROFILES


def resolve_prompts(request: GenerationRequest, rules: PromptRules, found: Findings) -> list[PlannedPrompt]:
    """The images to draw, with nothing left open.

    Args:
        request: what the client sent.
        rules: what its prompts are judged by.
        found: collects what cannot be honoured, and what has no effect.
    """
    if not request.prompts:
        found.refuse("prompts", "at least one is required")
    if len(request.prompts) > rules.limits.max_prompts:
        found.refuse("prompts", f"at most {rules.limits.max_prompts} prompts, got {len(request.prompts)}")
        return []
    if request.trigger_word and not any(TRIGGER in (prompt.prompt or "") for prompt in request.prompts):
        found.warn(
            WarningCode.TRIGGER_WORD_UNUSED, "trigger_word", f"no prompt contains {TRIGGER}, so it has no effect"
        )
    return [_resolve_prompt(prompt, index, rules, found) for index, prompt in enumerate(request.prompts)]


def _resolve_prompt(prompt: PromptRequest, index: int, rules: PromptRules, found: Findings) -> PlannedPrompt:
    at = f"prompts.{index}"
    defaults = rules.spec.defaults
    _refuse_foreign_options(prompt, at, found)
    guidance_scale = defaults.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
    found.in_range(f"{at}.guidance_scale", guidance_scale)
    sample_steps = defaults.sample_steps if prompt.sample_steps is None else prompt.sample_steps
    found.in_range(f"{at}.sample_steps", sample_steps)
    seed = defaults.seed + index if prompt.seed is None else prompt.seed
    if seed < MIN_SEED:
        found.refuse(f"{at}.seed", f"must be {MIN_SEED} (draw one) or more, got {seed}")
    sampling = resolve_sampling(prompt, at, defaults, rules.profile, rules.settings, found)
    refuse_too_few_steps(sample_steps, sampling.schedule, at, found)
    if rules.settings is DrawingSettings.COMFYUI:
        _refuse_embeddings(prompt, at, found)
    return PlannedPrompt(
        prompt=_replace_trigger(prompt, at, rules, found),
        width=_snap(f"{at}.width", prompt.width, defaults.width, rules, found),
        height=_snap(f"{at}.height", prompt.height, defaults.height, rules, found),
        sample_steps=sample_steps,
        guidance_scale=guidance_scale,
        seed=rules.draw_seed() if seed == MIN_SEED else seed,
        neg=_resolve_neg(prompt, guidance_scale, at, rules, found),
        sampler=sampling.sampler,
        schedule=sampling.schedule,
        shift=sampling.shift,
    )


def _resolve_neg(
    prompt: PromptRequest, guidance_scale: float, at: str, rules: PromptRules, found: Findings
) -> str:
    """The trainer takes it as it stands: no trigger word is put into it, and no space cut off."""
    neg = prompt.neg
    if not neg:
        return ""
    if not rules.is_preview and not prompt.use_neg:
        found.warn(
            WarningCode.NEG_IGNORED,
            f"{at}.neg",
            f"in the profile {rules.profile} the unconditional text is empty unless `use_neg` is true, so this "
            "has no effect",
        )
        return ""
    if not has_guidance(guidance_scale, rules.settings):
        single = "guidance of 1" if rules.settings is DrawingSettings.COMFYUI else "guidance of 1 and below"
        found.warn(
            WarningCode.NEG_WITHOUT_GUIDANCE, f"{at}.neg", f"{single} makes a single pass, so this has no effect"
        )
    if len(neg.encode()) > rules.limits.max_prompt_bytes:
        found.refuse(f"{at}.neg", f"at most {rules.limits.max_prompt_bytes} bytes, got {len(neg.encode())}")
    return neg


def _refuse_embeddings(prompt: PromptRequest, at: str, found: Findings) -> None:
    """Textual inversions, which ComfyUI reads where a prompt names one."""
    for name, text in (("prompt", prompt.prompt), ("neg", prompt.neg if prompt.use_neg else None)):
        if text and names_embedding(text):
            found.refuse(f"{at}.{name}", "names an `embedding:`, and there are none here: leave it out")


def _snap(path: str, asked: int | None, default: int, rules: PromptRules, found: Findings) -> int:
    size = default if asked is None else asked
    multiple = SIZE_MULTIPLE if rules.is_preview else rules.divisor
    found.in_range(path, size, TRAINER_SIZES if rules.is_preview else None)
    snapped = trainer_size(size) if rules.is_preview else size // multiple * multiple
    if snapped > size:
        found.warn(
            WarningCode.SIZE_SNAPPED,
            path,
            f"{size} was raised to {MIN_SIZE_PX}, the least in the profile {rules.profile}",
        )
    elif snapped != size:
        found.warn(
            WarningCode.SIZE_SNAPPED,
            path,
            f"{size} was floored to {snapped}, a multiple of {multiple}, in the profile {rules.profile}",
        )
    return snapped


def _replace_trigger(prompt: PromptRequest, at: str, rules: PromptRules, found: Findings) -> str:
    if prompt.prompt is None:
        found.refuse(f"{at}.prompt", "is required; it may be empty")
        return ""
    trigger_word = prompt.trigger_word or rules.trigger_word
    count = prompt.prompt.count(TRIGGER)
    if prompt.trigger_word and not count:
        found.warn(
            WarningCode.TRIGGER_WORD_UNUSED,
            f"{at}.trigger_word",
            f"the prompt does not contain {TRIGGER}, so it has no effect",
        )
    if count and not trigger_word:
        found.warn(
            WarningCode.TRIGGER_NOT_REPLACED,
            f"{at}.prompt",
            f"contains {TRIGGER} and no trigger word is given, so it stays as written",
        )
    # Sized before it is built: a short prompt of many placeholders can become enormous.
    size = len(prompt.prompt.encode())
    if trigger_word:
        size += count * (len(trigger_word.encode()) - len(TRIGGER))
    if size > rules.limits.max_prompt_bytes:
        found.refuse(
            f"{at}.prompt",
            f"at most {rules.limits.max_prompt_bytes} bytes after {TRIGGER} is replaced, would be {size}",
        )
        return ""
    return prompt.prompt.replace(TRIGGER, trigger_word) if trigger_word else prompt.prompt


def _refuse_foreign_options(prompt: PromptRequest, at: str, found: Findings) -> None:
    if prompt.fps is not None:
        found.in_range(f"{at}.fps", prompt.fps)
        found.warn(WarningCode.FPS_IGNORED, f"{at}.fps", "an image has no frames a second, so this has no effect")
    if prompt.num_frames is not None and prompt.num_frames != FRAMES:
        found.refuse(f"{at}.num_frames", f"Chroma draws single images, so only 1, got {prompt.num_frames}")
    if prompt.resolution and prompt.resolution not in RESOLUTIONS:
        found.refuse(f"{at}.resolution", f"only {RESOLUTIONS[0]!r} can be honoured")
    for name in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"):
        if getattr(prompt, name):
            found.refuse(f"{at}.{name}", "Chroma takes no control image")
