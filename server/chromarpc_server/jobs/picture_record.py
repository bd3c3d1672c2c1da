"""What an image was drawn with, as its file carries it: all that decided it, nothing of when, where, by whom.

Equal requests give equal records, so equal files: no times, job ids, paths or names of this machine, secrets.
`docs/pictures.md` lists the fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from chromarpc_server.domain.events import AdapterReport, Prepared
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput
from chromarpc_server.domain.requests import ImageFormat
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.trainer import TrainerSettings

RECORD_VERSION: Final = 1
"""Of the record's fields; later versions only add some."""
_ABSOLUTE: Final = re.compile(r"[/\\~]|[A-Za-z]:")
_PLAIN_VALUE: Final = re.compile(r'[^,:"\n\r]*')


@dataclass(frozen=True)
class PictureRecord:
    """One image's record in its two forms."""

    text: str = field(repr=False)
    """ASCII: JSON, of which `request` is a body that draws the image again."""
    parameters: str = field(repr=False)
    """Prompt and settings for people, in the form that image viewers know under `parameters`."""


def picture_record(plan: Plan, prompt_index: int, prepared: Prepared, *, device_dtype: str) -> PictureRecord:
    """The record of one of a plan's images.

    Args:
        plan: what was run.
        prompt_index: which of its prompts.
        prepared: what it was run with.
        device_dtype: what was computed in, but where the trainer's config decides that.
    """
    paths = [_recordable_path(lora, report) for lora, report in zip(plan.loras, prepared.adapters, strict=True)]
    record: dict[str, object] = {
        "version": RECORD_VERSION,
        "request": _request(plan, prompt_index, paths),
        "model": plan.model,
        "served_model": plan.served_model,
        "model_revision": prepared.model_revision,
        "adapters": [_adapter(path, report) for path, report in zip(paths, prepared.adapters, strict=True)],
        "tokens": {
            "used": prepared.token_counts[prompt_index].used,
            "cut": prepared.token_counts[prompt_index].cut,
        },
        "tiled": any(
            (warning.code, warning.field) == ("IMAGE_TILED", f"prompts.{prompt_index}")
            for warning in prepared.warnings
        ),
        "versions": dict(sorted(prepared.versions.items())),
        "device": prepared.device,
        "dtype": device_dtype if plan.trainer is None else plan.trainer.dtype,
    }
    if prepared.stored_as:
        record["stored_as"] = prepared.stored_as
    if prepared.second_device and plan.has_guidance(plan.prompts[prompt_index]):
        record["guidance_on_two_devices"] = True
    return PictureRecord(
        # ASCII, so that no writer and no reader of any file format changes a character of it.
        text=json.dumps(record, separators=(",", ":")),
        parameters=_parameters(plan, prompt_index, prepared, paths),
    )


def _request(plan: Plan, prompt_index: int, paths: list[str]) -> dict[str, object]:
    prompt = plan.prompts[prompt_index]
    request: dict[str, object] = {
        "model": plan.model,
        "loras": [
            {
                "path": path,
                "network_multiplier": lora.network_multiplier,
                **({} if lora.expected_sha256 is None else {"expected_sha256": lora.expected_sha256}),
            }
            for path, lora in zip(paths, plan.loras, strict=True)
        ],
        "prompts": [
            {
                "prompt": prompt.prompt,
                "width": prompt.width,
                "height": prompt.height,
                "sample_steps": prompt.sample_steps,
                "guidance_scale": prompt.guidance_scale,
                "seed": prompt.seed,
                **({"neg": prompt.neg, "use_neg": True} if prompt.neg else {}),
                "sampler": prompt.sampler,
                "schedule": prompt.schedule,
                **({} if prompt.shift is None else {"shift": prompt.shift}),
            }
        ],
        "output": _output(plan.output),
        "profile": plan.profile,
        "noise_draw": f"NOISE_DRAW_{plan.noise_draw.name}",
    }
    if plan.trainer is not None:
        request["trainer"] = _trainer(plan.trainer)
    if plan.settings is not DrawingSettings.REFERENCE:
        request["settings"] = plan.settings.value
    return request


def _output(output: PlannedOutput) -> dict[str, object]:
    said: dict[str, object] = {"format": f"IMAGE_FORMAT_{output.format.name}"}
    if output.format in (ImageFormat.JPEG, ImageFormat.WEBP):
        said["quality"] = output.quality
    if output.format is ImageFormat.JPEG_TRAINER:
        said["picture_record"] = True
    return said


def _trainer(trainer: TrainerSettings) -> dict[str, object]:
    return {
        "quantize": trainer.quantize,
        "qtype": trainer.qtype,
        "quantize_te": trainer.quantize_te,
        "dtype": trainer.dtype,
        "lokr_form": f"LOKR_FORM_{trainer.lokr_form.name}",
    }


def _adapter(path: str, report: AdapterReport) -> dict[str, object]:
    return {
        "path": path,
        "sha256": report.sha256,
        "network_multiplier": report.network_multiplier,
        "format": report.format,
        "rank": report.rank,
        "placement": report.placement.value,
        "matched_key_count": report.matched_keys,
        "unmatched_key_count": len(report.unmatched_keys),
    }


def _recordable_path(lora: PlannedLora, report: AdapterReport) -> str:
    """What a request could name the adapter by, without credentials, queries and places on this machine."""
    if lora.is_url:
        try:
            parts = urlsplit(lora.path)
            host = parts.hostname or ""
            port = f":{parts.port}" if parts.port is not None else ""
        except ValueError:
            return f"sha256:{report.sha256}"
        if ":" in host:
            host = f"[{host}]"
        return urlunsplit((parts.scheme, f"{host}{port}", parts.path, "", ""))
    if lora.path.startswith("sha256:") or not _ABSOLUTE.match(lora.path):
        return lora.path
    return f"sha256:{report.sha256}"


def _parameters(plan: Plan, prompt_index: int, prepared: Prepared, paths: list[str]) -> str:
    prompt = plan.prompts[prompt_index]
    facts: dict[str, Any] = {
        "Steps": prompt.sample_steps,
        "Sampler": prompt.sampler,
        "Schedule type": prompt.schedule,
        "CFG scale": f"{prompt.guidance_scale:g}",
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
        "Model": plan.served_model,
        "Model hash": prepared.model_revision[:12],
    }
    for number, (path, lora) in enumerate(zip(paths, plan.loras, strict=True)):
        facts[f"Lora {number}"] = f"{path} x {lora.network_multiplier:g}"
    if prompt.shift is not None:
        facts["Shift"] = f"{prompt.shift:g}"
    facts["Profile"] = plan.profile
    if plan.settings is not DrawingSettings.REFERENCE:
        facts["Settings"] = plan.settings.value
    facts["Version"] = f"chromarpc {prepared.versions.get('chromarpc', '')}".rstrip()
    negative = f"Negative prompt: {prompt.neg}\n" if prompt.neg else ""
    settings = ", ".join(f"{name}: {_quoted(f'{value}')}" for name, value in facts.items())
    return f"{prompt.prompt}\n{negative}{settings}"


def _quoted(value: str) -> str:
    """A value that could be taken for several, as JSON text."""
    return value if _PLAIN_VALUE.fullmatch(value) else json.dumps(value, ensure_ascii=False)
