"""Facts of pictures of AUTOMATIC1111's web UI and of Forge, out of their text of parameters.

The text is the prompt, then `Negative prompt: …`, then one line `Steps: 20, Sampler: Euler, …`. Adapters stand
in the prompt as `<lora:NAME:MULTIPLIER>`, and are taken out of it before it is read.
"""

from __future__ import annotations

import json
import math
import re
from typing import Final

from chromarpc.pictures.facts import OURS, UNKNOWN, Fact, PictureFacts, name_of_file
from chromarpc.pictures.requests import request_of
from chromarpc.sampling import REFERENCE

MAX_LORAS: Final = 100
_SETTING: Final = re.compile(r'\s*([\w][\w \-/()+.]{0,79}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NETWORK: Final = re.compile(r"<(?:lora|lyco):([^<>]{1,500})>")
_NEGATIVE: Final = "Negative prompt:"
_STEPS: Final = re.compile(r"Steps: \d")


def parameters_facts(text: str) -> PictureFacts | None:
    """What a text of parameters says; None where it is none."""
    parsed = _parse(text)
    if parsed is None:
        return None
    prompt, negative, settings = parsed
    version = settings.get("Version", "")
    ours = version.startswith(OURS)
    plain = prompt if ours else _NETWORK.sub("", prompt).strip()
    facts: dict[str, Fact] = {
        "prompt": Fact(plain),
        "neg": Fact(negative),
        "model": _model(settings),
        "model_revision": Fact(None, _hash_note(settings)),
        "sample_steps": _integer(settings.get("Steps")),
        "sampler": _sampler(settings.get("Sampler")),
        "scheduler": _text(settings.get("Schedule type")),
        "seed": _integer(settings.get("Seed")),
        "guidance_scale": _float(settings.get("CFG scale")),
        "guidance": _guidance(settings),
        "noise_draw": Fact(None, _random_note(settings)),
        "profile": _text(settings.get("Profile")),
    }
    facts |= _size(settings)
    facts |= _ours(settings) if ours else _networks(prompt, settings)
    if version:
        facts["versions"] = Fact(version)
    if "Diffusion in Low Bits" in settings:
        facts["dtype"] = Fact(None, f"its weights are held as {settings['Diffusion in Low Bits']}")
    remarks = [
        f"{name} ({settings[name]}) has no counterpart here"
        for name in ("Denoising strength", "Hires upscale", "Clip skip", "Shift", "Distilled CFG Scale")
        if name in settings and not (ours and name == "Shift")
    ]
    return PictureFacts(
        program=version if ours else _program(version),
        facts=facts,
        request=request_of(facts),
        remarks=tuple(remarks),
    )


def _program(version: str) -> str:
    name = "Forge" if version.startswith("f") or "neo" in version.lower() else "AUTOMATIC1111 or Forge"
    return f"{name} {version}".rstrip() if version else name


def _parse(text: str) -> tuple[str, str, dict[str, str]] | None:
    lines = text.strip().split("\n")
    last = next((at for at in range(len(lines) - 1, -1, -1) if _STEPS.match(lines[at].strip())), None)
    if last is None:
        return None
    settings = {name: _unquoted(value) for name, value in _SETTING.findall(" ".join(lines[last:])[:65536])}
    begin = next((at for at in range(last) if lines[at].strip().startswith(_NEGATIVE)), last)
    negative = "\n".join(lines[begin:last]).strip().removeprefix(_NEGATIVE).strip()
    return "\n".join(lines[:begin]).strip(), negative, settings


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value.strip()


def _networks(prompt: str, settings: dict[str, str]) -> dict[str, Fact]:
    facts: dict[str, Fact] = {}
    hashes: dict[str, str] = {}
    for part in settings.get("Lora hashes", "").split(","):
        name, _, short = part.strip().partition(": ")
        hashes[name] = short
    for number, body in enumerate(_NETWORK.findall(prompt)[:MAX_LORAS]):
        name, *arguments = body.split(":")
        named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        placed = [argument for argument in arguments if "=" not in argument]
        # The second number, where there is one, is the transformer's; the first is the text encoder's then too.
        multiplier = named.get("unet", placed[1] if len(placed) > 1 else placed[0] if placed else "1")
        short = hashes.get(name, "")
        at = f"loras.{number}"
        facts[f"{at}.path"] = Fact(name, same_as=name_of_file(name))
        facts[f"{at}.sha256"] = Fact(None, f"the hash {short} is of its tensors, not of the file" if short else "")
        facts[f"{at}.network_multiplier"] = _float(multiplier)
        facts[f"{at}.placement"] = Fact(None, "merged as it is loaded, or at each call, as its settings say")
    return facts


def _ours(settings: dict[str, str]) -> dict[str, Fact]:
    """Of this project's own text, where its record was lost."""
    facts: dict[str, Fact] = {"settings": Fact(settings.get("Settings", REFERENCE))}
    if "Shift" in settings:
        facts["shift"] = _float(settings["Shift"])
    for number in range(MAX_LORAS):
        path, found, multiplier = settings.get(f"Lora {number}", "").rpartition(" x ")
        if not found:
            break
        facts[f"loras.{number}.path"] = Fact(path, same_as=name_of_file(path))
        facts[f"loras.{number}.sha256"] = UNKNOWN
        facts[f"loras.{number}.network_multiplier"] = _float(multiplier)
    return facts


def _model(settings: dict[str, str]) -> Fact:
    name = settings.get("Model")
    return Fact(name, same_as=name_of_file(name)) if name else UNKNOWN


def _hash_note(settings: dict[str, str]) -> str:
    short = settings.get("Model hash", "")
    return f"only the beginning of a hash of its own is told: {short}" if short else ""


def _sampler(name: str | None) -> Fact:
    if not name:
        return UNKNOWN
    return Fact(name, same_as="euler" if name.lower() in ("euler", "flowmatch") else name.lower())


def _guidance(settings: dict[str, str]) -> Fact:
    if "Distilled CFG Scale" in settings:
        said = f"and Distilled CFG Scale {settings['Distilled CFG Scale']}, which Chroma has not"
        return Fact("classifier-free", said)
    return Fact("classifier-free", "one pass at 1, without negative text") if "CFG scale" in settings else UNKNOWN


def _random_note(settings: dict[str, str]) -> str:
    source = settings.get("RNG")
    return f"drawn by {source}" if source else "drawn on the GPU, unless its settings say CPU"


def _size(settings: dict[str, str]) -> dict[str, Fact]:
    width, found, height = settings.get("Size", "").partition("x")
    return {"width": _integer(width), "height": _integer(height)} if found else {}


def _text(value: str | None) -> Fact:
    return Fact(value) if value else UNKNOWN


def _integer(value: str | None) -> Fact:
    return Fact(int(value)) if value and value.isascii() and value.isdecimal() and len(value) < 20 else UNKNOWN


def _float(value: str | None) -> Fact:
    try:
        found = float(value) if value else math.nan
    except ValueError:
        return UNKNOWN
    return Fact(found) if math.isfinite(found) else UNKNOWN
