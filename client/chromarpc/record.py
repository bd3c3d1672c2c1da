"""What a picture was drawn with, as it is kept in the picture's file.

The record's `request` is a body for `chromarpc generate --json`; the rest says what it ran on, so that a
picture that comes out differently can be explained.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from chromarpc.sampling import REFERENCE
from chromarpc.version import __version__

if TYPE_CHECKING:
    from chromarpc.events import TrainerOptions
    from chromarpc.images import GeneratedImage


def run_record(image: GeneratedImage) -> dict[str, object]:
    """The record of one image, as JSON values."""
    plan, prepared = image.plan, image.prepared
    record: dict[str, object] = {
        "request": repeat_request(image),
        "job_id": plan.job_id,
        "prompt_index": image.prompt_index,
        "accepted_at": plan.time.isoformat(),
        "model": plan.model,
        "served_model": plan.served_model,
        "client_version": __version__,
    }
    if prepared is not None:
        record |= {
            "model_revision": prepared.model_revision,
            "adapters": [
                {
                    "path": adapter.path,
                    "sha256": adapter.sha256,
                    "format": adapter.format,
                    "rank": adapter.rank,
                }
                for adapter in prepared.adapters
            ],
            "versions": dict(prepared.versions),
            "device": prepared.device,
        }
        if prepared.stored_as:
            record["stored_as"] = prepared.stored_as
        if prepared.second_device and _has_guidance(image):
            record["guidance_on_two_devices"] = True
    if image.warnings:
        record["warnings"] = [{"code": w.code, "field": w.field, "message": w.message} for w in image.warnings]
    return record


def _has_guidance(image: GeneratedImage) -> bool:
    """Whether each step made an unconditional pass: above 1, and as ComfyUI below 1 too."""
    scale = image.prompt.guidance_scale
    return scale > 1 or (scale < 1 and image.plan.settings != REFERENCE)


def repeat_request(image: GeneratedImage) -> dict[str, object]:
    """The request body that draws this one image again."""
    plan, prompt = image.plan, image.prompt
    has_record_by_default = plan.output_format != "jpeg-trainer"
    output: dict[str, object] = {"format": f"IMAGE_FORMAT_{plan.output_format.upper().replace('-', '_')}"}
    if plan.output_quality is not None:
        output["quality"] = plan.output_quality
    if plan.picture_record != has_record_by_default:
        output["picture_record"] = plan.picture_record
    request: dict[str, object] = {
        "model": plan.model,
        "loras": [
            {
                "path": lora.path,
                "network_multiplier": lora.network_multiplier,
                **({"expected_sha256": lora.expected_sha256} if lora.expected_sha256 is not None else {}),
            }
            for lora in plan.loras
        ],
        "prompts": [
            {
                "prompt": prompt.prompt,
                "width": prompt.width,
                "height": prompt.height,
                "sample_steps": prompt.sample_steps,
                "guidance_scale": prompt.guidance_scale,
                "seed": image.seed,
                **({"neg": prompt.neg, "use_neg": True} if prompt.neg else {}),
                "sampler": prompt.sampler,
                "schedule": prompt.schedule,
                **({} if prompt.shift is None else {"shift": prompt.shift}),
            }
        ],
        "output": output,
        "profile": plan.profile,
        "noise_draw": f"NOISE_DRAW_{plan.noise_draw.upper()}",
    }
    if plan.trainer is not None:
        request["trainer"] = _trainer(plan.trainer)
    if plan.settings != REFERENCE:
        request["settings"] = plan.settings
    return request


def _trainer(options: TrainerOptions) -> dict[str, object]:
    said = {name: value for name, value in asdict(options).items() if value is not None}
    return said | ({"lokr_form": f"LOKR_FORM_{options.lokr_form.upper()}"} if options.lokr_form else {})


def parameters_line(image: GeneratedImage) -> str:
    """Prompt and settings for people, in the form that image viewers know under `parameters`."""
    plan, prompt = image.plan, image.prompt
    facts = {
        "Steps": prompt.sample_steps,
        "Sampler": prompt.sampler,
        "Schedule type": prompt.schedule,
        "CFG scale": f"{prompt.guidance_scale:g}",
        "Seed": image.seed,
        "Size": f"{image.width}x{image.height}",
        "Model": plan.served_model,
    }
    if image.prepared is not None:
        facts["Model hash"] = image.prepared.model_revision[:12]
    for number, lora in enumerate(plan.loras):
        facts[f"Lora {number}"] = f"{lora.path} x {lora.network_multiplier:g}"
    if prompt.shift is not None:
        facts["Shift"] = f"{prompt.shift:g}"
    if plan.settings != REFERENCE:
        facts["Settings"] = plan.settings
    facts["Version"] = f"chromarpc {__version__}"
    negative = f"Negative prompt: {prompt.neg}\n" if prompt.neg else ""
    return f"{prompt.prompt}\n{negative}" + ", ".join(f"{name}: {value}" for name, value in facts.items())
