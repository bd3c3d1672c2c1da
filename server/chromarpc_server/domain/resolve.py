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
from chromarpc_server.domain.prompts import PromptRules, resolve_prompts
from chromarpc_server.domain.requests import GenerationRequest, ImageFormat, LoraRequest, NoiseDraw
from chromarpc_server.domain.sampling_options import resolve_settings
from chromarpc_server.domain.trainer_options import resolve_trainer
from chromarpc_server.domain.warning_codes import WarningCode

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

    profile = request.profile or spec.defaults.profile or serving.default_profile
    if profile not in serving.profiles:
        known = ", ".join(serving.profiles)
        found.refuse("profile", f"no such numerics profile: {profile[:64]!r}; known are {known}")
    for name in ("kv_cache", "match_target_res"):
        if getattr(request, name):
            found.refuse(name, "Chroma has no such option")
    for path in request.unknown_fields[:MAX_LISTED]:
        found.warn(WarningCode.UNKNOWN_FIELD, path, "this server's version of the API does not know it")
    settings = resolve_settings(request.settings, profile, request.noise_draw, found)
    rules = PromptRules(spec, divisor, profile, settings, limits, request.trigger_word, draw_seed)
    loras = _resolve_loras(request.loras, rules, found)
    if request.hf_token and not any(lora.is_url for lora in loras):
        found.warn(
            WarningCode.HF_TOKEN_UNUSED, "hf_token", "no adapter of this request is fetched, so it has no effect"
        )
    prompts = resolve_prompts(request, rules, found)
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
        settings=settings,
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


def _resolve_loras(loras: Sequence[LoraRequest], rules: PromptRules, found: Findings) -> list[PlannedLora]:
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
        found.refuse(
            "prompts", f"at most {limits.max_pixel_steps} pixels × calls of the model in all, got {pixel_steps}"
        )
