"""Facts of this project's pictures: of the server's record, and of the older one that the client wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from chromarpc.pictures.facts import OURS, UNKNOWN, Fact, PictureFacts, Value, name_of_file
from chromarpc.sampling import COMFYUI, FLOWMATCH, REFERENCE

MAX_ADAPTERS: Final = 100
MAX_NAMES: Final = 50
"""Of versions, and of a trainer's options."""
LARGEST_SCALE: Final = 10**300
SAMPLER: Final = Fact(FLOWMATCH, "Euler steps along the flow", same_as="euler")
SCHEDULER: Final = Fact(FLOWMATCH, "evenly spaced, shifted by the picture's size")
GUIDANCE: Final = Fact("classifier-free", "one pass at 1 and below")
COMFYUI_GUIDANCE: Final = Fact("classifier-free", "one pass at 1 alone")
ON_TWO_DEVICES: Final = "a pass on each, which changes no bit in exact and rounds otherwise in other profiles"
PREVIEW_PROFILES: Final = ("preview", "preview-exact")
DTYPES: Final = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}
"""The trainer's other words for types."""


class Unreadable(Exception):
    """A record that is none; a sentence for people."""


def read_record(text: str) -> dict[str, Any]:
    """The record's values.

    Raises:
        Unreadable: it is no record.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("its record cannot be read: no JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("request"), dict):
        raise Unreadable("its record cannot be read: there is no request in it")
    return record


def recorded_facts(text: str) -> PictureFacts:
    """What a record says.

    Raises:
        Unreadable: it is no record.
    """
    record = read_record(text)
    request = record["request"]
    prompts = request.get("prompts")
    prompt = prompts[0] if isinstance(prompts, list) and prompts and isinstance(prompts[0], dict) else {}
    versions = record.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    profile = request.get("profile")
    settings = request.get("settings", REFERENCE)
    facts: dict[str, Fact] = {
        "model": _fact(record.get("served_model", request.get("model"))),
        "model_revision": _fact(record.get("model_revision")),
        "profile": _fact(profile),
        "settings": _fact(settings),
        "dtype": _fact(record.get("dtype")),
        "device": _fact(record.get("device")),
        "sampler": _named(prompt.get("sampler"), SAMPLER),
        "scheduler": _named(prompt.get("schedule"), SCHEDULER if "shift" not in prompt else Fact(FLOWMATCH)),
        "guidance": COMFYUI_GUIDANCE if settings == COMFYUI else GUIDANCE,
        "noise_draw": _fact(_short(request.get("noise_draw"), "NOISE_DRAW_")),
        "neg": Fact("", "" if profile in PREVIEW_PROFILES else "none that had an effect"),
    }
    for name in ("prompt", "width", "height", "seed", "sample_steps", "guidance_scale", "shift", "neg"):
        if name in prompt:
            facts[name] = _fact(_number(name, prompt[name]))
    facts |= dict(_adapters(request, record))
    facts |= {f"versions.{name}": _fact(value) for name, value in sorted(versions.items())[:MAX_NAMES]}
    trainer = request.get("trainer")
    if isinstance(trainer, dict):
        facts |= {
            f"trainer.{name}": _trainer_fact(name, value) for name, value in list(trainer.items())[:MAX_NAMES]
        }
    output = request.get("output")
    if isinstance(output, dict):
        facts["output.format"] = _fact(_short(output.get("format"), "IMAGE_FORMAT_"))
        if "quality" in output:
            facts["output.quality"] = _fact(output["quality"])
    tokens = record.get("tokens")
    if isinstance(tokens, dict) and tokens.get("cut"):
        facts["tokens"] = Fact(f"{tokens.get('used')} read, {tokens.get('cut')} cut off")
    if record.get("stored_as"):
        facts["stored_as"] = _fact(record["stored_as"], "how the file of its weights stores them")
    if record.get("tiled"):
        facts["tiled"] = Fact(True, "decoded in tiles, which changes pixels a little")
    if record.get("guidance_on_two_devices"):
        facts["guidance_on_two_devices"] = Fact(True, ON_TWO_DEVICES)
    version = versions.get("chromarpc", record.get("client_version", ""))
    return PictureFacts(
        program=f"{OURS} {version}".rstrip(), facts=facts, request=request, urls=tuple(_urls(request))
    )


def recorded_hashes(text: str) -> tuple[str, dict[str, str]]:
    """The model's revision and each adapter's SHA-256 by the path that the request names; empty where nobody says.

    Raises:
        Unreadable: it is no record.
    """
    record = read_record(text)
    hashes = {}
    for lora, adapter in _paired(record["request"], record):
        path, sha256 = lora.get("path"), adapter.get("sha256")
        if isinstance(path, str) and isinstance(sha256, str):
            hashes[path] = sha256
    revision = record.get("model_revision")
    return revision if isinstance(revision, str) else "", hashes


def _paired(
    request: Mapping[str, Any], record: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    loras, adapters = request.get("loras"), record.get("adapters")
    loras = loras if isinstance(loras, list) else []
    adapters = adapters if isinstance(adapters, list) else []
    for number, lora in enumerate(loras[:MAX_ADAPTERS]):
        adapter = adapters[number] if number < len(adapters) else {}
        yield lora if isinstance(lora, dict) else {}, adapter if isinstance(adapter, dict) else {}


def _adapters(request: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[tuple[str, Fact]]:
    for number, (lora, adapter) in enumerate(_paired(request, record)):
        at = f"loras.{number}"
        path = lora.get("path")
        yield f"{at}.path", Fact(path, same_as=name_of_file(path)) if isinstance(path, str) else UNKNOWN
        yield f"{at}.sha256", _fact(adapter.get("sha256"))
        multiplier = lora.get("network_multiplier", 1.0)
        yield f"{at}.network_multiplier", _fact(_number("network_multiplier", multiplier))
        placed = {"merged": "merged into the weights", "beside": "computed beside the weights"}
        placement = adapter.get("placement")
        yield f"{at}.placement", _fact(placement, placed.get(f"{placement}", ""))
        unmatched = adapter.get("unmatched_key_count")
        if unmatched:
            yield f"{at}.unmatched_key_count", _fact(unmatched, "keys of the file that the model does not have")


def _urls(request: Mapping[str, Any]) -> Iterator[str]:
    for lora, _ in _paired(request, {}):
        path = lora.get("path")
        if isinstance(path, str) and path.lower().startswith(("http://", "https://")):
            yield path


def _number(name: str, value: Any) -> Any:
    """Scales as floats, so that 4 and 4.0 are shown alike; None where one is beyond them."""
    is_scale = name in ("guidance_scale", "network_multiplier", "shift")
    if not is_scale or isinstance(value, bool) or not isinstance(value, int):
        return value
    return float(value) if abs(value) < LARGEST_SCALE else None


def _named(value: Any, usual: Fact) -> Fact:
    """A sampler or a schedule; older records name none, since there was one."""
    return usual if value is None or value == usual.value else _fact(value)


def _short(value: Any, prefix: str) -> Any:
    return value.removeprefix(prefix).lower().replace("_", "-") if isinstance(value, str) else value


def _trainer_fact(name: str, value: Any) -> Fact:
    if name == "dtype" and isinstance(value, str):
        return Fact(value, same_as=DTYPES.get(value))
    return _fact(_short(value, "LOKR_FORM_") if name == "lokr_form" else value)


def _fact(value: Any, note: str = "") -> Fact:
    known: Value | None = value if isinstance(value, str | int | float | bool) else None
    return Fact(None if known != known else known, note)  # noqa: PLR0124 - NaN is no value
