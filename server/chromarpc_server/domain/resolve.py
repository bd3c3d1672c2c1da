"""Request in, plan out: the one place where defaults are filled in and values are judged.

Every violation of a request is collected before any is raised, so that a client sees them all at once.
Ranges and names are the reference schema's (docs/api.md).
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from chromarpc_server.domain.adapter_urls import is_url, url_problem
from chromarpc_server.domain.errors import MAX_LISTED, ModelNotFound, first_named
from chromarpc_server.domain.findings import Findings
from chromarpc_server.domain.limits import Limits
from chromarpc_server.domain.models import REGISTRY, ModelSpec
from chromarpc_server.domain.plan import (
    Plan,
    PlannedLora,
    PlannedOutput,
    PlannedPreview,
    PlannedPrompt,
)
from chromarpc_server.domain.requests import (
    FRAMES,
    MIN_SEED,
    RESOLUTIONS,
    SAMPLERS,
    GenerationRequest,
    ImageFormat,
    LoraRequest,
    NoiseDraw,
    PromptRequest,
)
from chromarpc_server.domain.trainer import (
    MIN_SIZE_PX,
    PREVIEW_PROFILES,
    SIZE_MULTIPLE,
    TRAINER_SIZES,
    trainer_size,
)
from chromarpc_server.domain.trainer_options import resolve_trainer
from chromarpc_server.domain.warning_codes import WarningCode

TRIGGER = "[trigger]"
MAX_QUEUE_S = 30 * 86_400
MAX_LORA_PATH_BYTES = 4096
MAX_UUID_LENGTH = len("urn:uuid:{00000000-0000-0000-0000-000000000000}")
DEFAULT_QUALITY = 95
TRAINER_QUALITY = 75
"""Pillow's default for JPEG, with which the trainer writes its samples."""


def draw_seed() -> int:
    """A random seed, 0 to 2³² − 1."""
    return secrets.randbelow(2**32)


class PictureRecords(Enum):
    """Whether images may carry what they were drawn with."""

    WRITTEN = auto()
    OFF = auto()
    """The server writes none."""
    KEPT_OUT = auto()
    """Images are kept where no prompt may be."""


@dataclass(frozen=True)
class Serving:
    """What the server's settings say about requests."""

    models: Mapping[str, ModelSpec] = field(default_factory=lambda: REGISTRY)
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Requests for the key are computed by the model of the value."""
    profiles: tuple[str, ...] = ("reference", "exact", "fp8")
    default_profile: str = "reference"
    limits: Limits = Limits()
    picture_records: PictureRecords = PictureRecords.WRITTEN


def resolve(request: GenerationRequest, serving: Serving, *, draw_seed: Callable[[], int] = draw_seed) -> Plan:
    """Turns a request into a plan.

    Args:
        request: what the client sent. An empty text means nothing, as if it were left out, but for a prompt.
        serving: models, aliases, profiles and limits of this server.
        draw_seed: gives the seed of a prompt whose seed is −1.

    Raises:
        InvalidParameter: with one violation for each field at fault, an unknown model among them.
        ModelNotFound: no model has this id, and nothing else is wrong.
    """
    found = Findings()
    limits = serving.limits
    asked = serving.models.get(request.model or "")
    # Without a model everything else is judged all the same: ranges and limits are the same for all.
    spec = asked or next(iter(serving.models.values()))
    served_id = serving.aliases.get(spec.id, spec.id)
    divisor = serving.models[served_id].resolution_divisor
    unknown_model = None
    if request.model is None:
        found.refuse("model", "is required")
    elif asked is None:
        unknown_model = model_not_found(request.model, serving.models)
    elif served_id != spec.id:
        found.warn(WarningCode.MODEL_ALIASED, "model", f"{spec.id} is served by {served_id} on this server")

    profile = request.profile or serving.default_profile
    if profile not in serving.profiles:
        known = ", ".join(serving.profiles)
        found.refuse("profile", f"no such numerics profile: {profile[:64]!r}; known are {known}")
    for name in ("kv_cache", "match_target_res"):
        if getattr(request, name):
            found.refuse(name, "Chroma has no such option")
    for path in request.unknown_fields[:MAX_LISTED]:
        found.warn(WarningCode.UNKNOWN_FIELD, path, "this server's version of the API does not know it")
    rules = _Rules(spec, divisor, profile, limits, request.trigger_word, draw_seed)
    loras = _resolve_loras(request.loras, rules, found)
    if request.hf_token and not any(lora.is_url for lora in loras):
        found.warn(
            WarningCode.HF_TOKEN_UNUSED, "hf_token", "no adapter of this request is fetched, so it has no effect"
        )
    prompts = _resolve_prompts(request, rules, found)
    output = _resolve_output(request, serving, found)
    preview = _resolve_preview(request, prompts, found)
    trainer = resolve_trainer(request.trainer, profile, found)
    if asked is not None:  # sizes that are left out are the model's
        _check_totals(prompts, limits, found)
    _check_delivery(request, found)
    if unknown_model is not None:
        if not found.violations:
            raise unknown_model
        found.violations[:0] = unknown_model.violations
    found.raise_if_any()
    return Plan(
        model=spec.id,
        served_model=served_id,
        profile=profile,
        noise_draw=request.noise_draw or NoiseDraw.FLOAT32,
        prompts=tuple(prompts),
        loras=tuple(loras),
        output=output,
        preview=preview,
        warnings=tuple(found.warnings),
        request_id=request.request_id or None,
        detached=request.detach,
        may_return=request.request_id is not None and not request.detach and not request.cancel_at_once,
        max_queue_s=request.max_queue_s,
        trainer=trainer,
    )


def model_not_found(model_id: str, models: Iterable[str]) -> ModelNotFound:
    """The error for an id that none of the models has."""
    served = sorted(models)
    return ModelNotFound(
        f"no model has the id {model_id[:64]!r}; this server knows {first_named(served)}",
        field="model",
        metadata={"models": ",".join(served[:MAX_LISTED])},
    )


def is_request_id(text: str) -> bool:
    """Whether it is a UUID."""
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return len(text) <= MAX_UUID_LENGTH  # Python takes any number of hyphens


def _check_delivery(request: GenerationRequest, found: Findings) -> None:
    if request.request_id and not is_request_id(request.request_id):
        found.refuse("request_id", "not a UUID")
    if request.max_queue_s is not None and not 0 < request.max_queue_s <= MAX_QUEUE_S:
        found.refuse("max_queue_time", f"must be more than 0 and at most {MAX_QUEUE_S} seconds")


@dataclass(frozen=True)
class _Rules:
    """What every prompt and adapter of one request is judged by."""

    spec: ModelSpec
    divisor: int
    profile: str
    limits: Limits
    trigger_word: str | None
    draw_seed: Callable[[], int]

    @property
    def is_preview(self) -> bool:
        """Whether the trainer's own image is drawn."""
        return self.profile in PREVIEW_PROFILES


def _resolve_loras(loras: Sequence[LoraRequest], rules: _Rules, found: Findings) -> list[PlannedLora]:
    if len(loras) > rules.limits.max_loras:
        found.refuse("loras", f"at most {rules.limits.max_loras} adapters, got {len(loras)}")
        return []
    planned = []
    for index, lora in enumerate(loras):
        at = f"loras.{index}"
        if not lora.path:
            found.refuse(f"{at}.path", "is required")
        elif len(lora.path.encode()) > MAX_LORA_PATH_BYTES:
            found.refuse(f"{at}.path", f"longer than {MAX_LORA_PATH_BYTES} bytes")
        elif is_url(lora.path) and (problem := url_problem(lora.path)) is not None:
            found.refuse(f"{at}.path", problem)
        if lora.transformer:
            found.refuse(f"{at}.transformer", "Chroma has one transformer, so this cannot be honoured")
        multiplier = lora.network_multiplier
        if multiplier is None:
            multiplier = rules.spec.defaults.network_multiplier
        found.in_range(f"{at}.network_multiplier", multiplier)
        expected = lora.expected_sha256 or None
        if expected is not None and re.fullmatch(r"[0-9a-fA-F]{64}", expected) is None:
            found.refuse(f"{at}.expected_sha256", "must be 64 hexadecimal digits")
        planned.append(
            PlannedLora(
                path=lora.path or "",
                network_multiplier=multiplier,
                expected_sha256=None if expected is None else expected.lower(),
            )
        )
    return planned


def _resolve_prompts(request: GenerationRequest, rules: _Rules, found: Findings) -> list[PlannedPrompt]:
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


def _resolve_prompt(prompt: PromptRequest, index: int, rules: _Rules, found: Findings) -> PlannedPrompt:
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
    return PlannedPrompt(
        prompt=_replace_trigger(prompt, at, rules, found),
        width=_snap(f"{at}.width", prompt.width, defaults.width, rules, found),
        height=_snap(f"{at}.height", prompt.height, defaults.height, rules, found),
        sample_steps=sample_steps,
        guidance_scale=guidance_scale,
        seed=rules.draw_seed() if seed == MIN_SEED else seed,
        neg=_resolve_neg(prompt.neg or "", guidance_scale, at, rules, found),
    )


def _resolve_neg(neg: str, guidance_scale: float, at: str, rules: _Rules, found: Findings) -> str:
    """The trainer takes it as it stands: no trigger word is put into it, and no space cut off."""
    if not neg:
        return ""
    if not rules.is_preview:
        found.warn(
            WarningCode.NEG_IGNORED,
            f"{at}.neg",
            f"in the profile {rules.profile} Chroma's unconditional text is always empty, so this has no effect",
        )
        return ""
    if guidance_scale <= 1:
        found.warn(
            WarningCode.NEG_WITHOUT_GUIDANCE,
            f"{at}.neg",
            "guidance of 1 and below makes a single pass, so this has no effect",
        )
    if len(neg.encode()) > rules.limits.max_prompt_bytes:
        found.refuse(f"{at}.neg", f"at most {rules.limits.max_prompt_bytes} bytes, got {len(neg.encode())}")
    return neg


def _snap(path: str, asked: int | None, default: int, rules: _Rules, found: Findings) -> int:
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


def _replace_trigger(prompt: PromptRequest, at: str, rules: _Rules, found: Findings) -> str:
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
    if prompt.sampler and prompt.sampler not in SAMPLERS:
        found.refuse(f"{at}.sampler", f"Chroma is sampled with {SAMPLERS[0]!r} only")
    if prompt.num_frames is not None and prompt.num_frames != FRAMES:
        found.refuse(f"{at}.num_frames", f"Chroma draws single images, so only 1, got {prompt.num_frames}")
    if prompt.resolution and prompt.resolution not in RESOLUTIONS:
        found.refuse(f"{at}.resolution", f"only {RESOLUTIONS[0]!r} can be honoured")
    for name in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"):
        if getattr(prompt, name):
            found.refuse(f"{at}.{name}", "Chroma takes no control image")


def _resolve_output(request: GenerationRequest, serving: Serving, found: Findings) -> PlannedOutput:
    image_format = request.output.format or ImageFormat.PNG
    quality = request.output.quality
    if quality is not None:
        if image_format is ImageFormat.PNG:
            found.refuse("output.quality", "PNG is lossless and has no quality")
        elif image_format is ImageFormat.JPEG_TRAINER:
            found.refuse("output.quality", f"the trainer writes its samples with {TRAINER_QUALITY}, always")
        else:
            found.in_range("output.quality", quality)
    is_trainers = image_format is ImageFormat.JPEG_TRAINER
    default_quality = TRAINER_QUALITY if is_trainers else DEFAULT_QUALITY
    return PlannedOutput(
        format=image_format,
        quality=default_quality if quality is None else quality,
        picture_record=_resolve_record(request.output.picture_record, not is_trainers, serving, found),
    )


def _resolve_record(asked: bool | None, default: bool, serving: Serving, found: Findings) -> bool:
    wanted = default if asked is None else asked
    if serving.picture_records is PictureRecords.WRITTEN:
        return wanted
    kept_out = serving.picture_records is PictureRecords.KEPT_OUT
    if asked or (wanted and kept_out):
        found.warn(
            WarningCode.PICTURE_RECORD_LEFT_OUT,
            "output.picture_record",
            f"images carry no record: this server {'keeps them and no prompts' if kept_out else 'writes none'}",
        )
    return False


def _resolve_preview(
    request: GenerationRequest, prompts: Sequence[PlannedPrompt], found: Findings
) -> PlannedPreview | None:
    every = request.preview.every_n_steps
    found.in_range("preview.every_n_steps", every)
    asked_side = request.preview.max_side_px
    max_side_px = 256 if asked_side is None else asked_side
    found.in_range("preview.max_side_px", max_side_px)
    if every == 0:
        if asked_side is not None:
            found.warn(
                WarningCode.PREVIEW_OFF, "preview.max_side_px", "previews are off (every_n_steps is 0): no effect"
            )
        return None
    if prompts and all(prompt.sample_steps <= every for prompt in prompts):
        found.warn(
            WarningCode.PREVIEW_NEVER,
            "preview.every_n_steps",
            "no image has more steps than this, so no preview will come before the image itself",
        )
    return PlannedPreview(every_n_steps=every, max_side_px=max_side_px)


def _check_totals(prompts: Sequence[PlannedPrompt], limits: Limits, found: Findings) -> None:
    pixels = sum(prompt.width * prompt.height for prompt in prompts)
    if pixels > limits.max_pixels:
        found.refuse("prompts", f"at most {limits.max_pixels} pixels in all, got {pixels}")
    pixel_steps = sum(prompt.pixel_steps for prompt in prompts)
    if pixel_steps > limits.max_pixel_steps:
        found.refuse("prompts", f"at most {limits.max_pixel_steps} pixels × steps in all, got {pixel_steps}")
