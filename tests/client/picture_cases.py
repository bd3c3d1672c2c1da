"""Pictures, and what is to be said of each, for all who read pictures: the page reads them in TypeScript.

`python -m tests.client.picture_cases` writes `picture_cases.json` anew: the pictures, and what this package says.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import struct
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from PIL import Image

from chromarpc.cli.explain import _comparison, _explanation
from chromarpc.pictures.comparison import PixelComparison, compare_facts
from chromarpc.pictures.files import NoPicture
from chromarpc.pictures.opened import OpenedPicture, open_picture
from tests.client.picture_files import (
    A1111,
    COMFYUI,
    COMFYUI_CUSTOM,
    FORGE,
    HOSTILE,
    RECORD,
    WORKFLOW,
    chunk,
    comfyui_webp,
    pixels,
    png_of,
    png_with,
    saved,
    with_comment,
)

FILE: Final = Path(__file__).with_name("picture_cases.json")
LARGEST_CASE_BYTES: Final = 20_000
COMPARED: Final = (
    ("ours.png", "ours.png"),
    ("ours.png", "ours-changed.jpg"),
    ("ours.png", "ours-preview.webp"),
    ("ours-preview.webp", "ours-preview-bfloat16.webp"),
    ("ours.png", "ours-without-adapter.png"),
    ("ours.png", "ours-odd.png"),
    ("ours.png", "comfyui.png"),
    ("ours.png", "ours-sampled.png"),
    ("ours-sampled.png", "comfyui.png"),
    ("ours-sampled.png", "ours-sampled-lost.png"),
    ("a1111.png", "ours-preview.webp"),
    ("comfyui.png", "comfyui-custom.png"),
    ("a1111.png", "forge.webp"),
    ("ours-lost.png", "ours.png"),
    ("1795648942091__000000000_1.jpg", "ours.png"),
    ("plain.png", "1795648942091__000000000_1.jpg"),
)
"""Pairs of which it is told what differs."""


def changed(**values: Any) -> dict[str, Any]:
    """The record of the other tests with some values changed; those of a dictionary one by one."""
    record: dict[str, Any] = json.loads(json.dumps(RECORD))
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(record.get(name), dict):
            record[name] |= value
        else:
            record[name] = value
    return record


def prompted(**values: Any) -> dict[str, Any]:
    """A request's prompts with some values changed."""
    return {"prompts": [RECORD["request"]["prompts"][0] | values]}


PREVIEW: Final = changed(
    request={
        **prompted(prompt="a cat", neg="ugly,\nbad", width=80, guidance_scale=4),
        "profile": "preview",
        "loras": [
            {
                "path": "https://example.test/a.safetensors",
                "network_multiplier": 0.3,
                "expected_sha256": "ef" * 32,
            },
            {"path": "sha256:" + "12" * 32, "network_multiplier": 1e-05},
        ],
        "trainer": {
            "quantize": True,
            "qtype": "qfloat8",
            "quantize_te": False,
            "dtype": "bf16",
            "lokr_form": "LOKR_FORM_WEIGHT",
        },
        "output": {"format": "IMAGE_FORMAT_WEBP", "quality": 90},
    },
    adapters=[
        {"sha256": "ef" * 32, "placement": "beside", "unmatched_key_count": 3},
        {"sha256": "12" * 32, "placement": "elsewhere"},
    ],
    tokens={"used": 512, "cut": 7},
    tiled=True,
    guidance_on_two_devices=True,
    versions={"diffusers": "0.36.0", "Torch": "2", "torch": "2.13.0"},
)
SAME_PREVIEW: Final = {
    **PREVIEW,
    "request": {**PREVIEW["request"], "trainer": {**PREVIEW["request"]["trainer"], "dtype": "bfloat16"}},
}
"""With the other word for its type."""
SAMPLED: Final = changed(
    request={
        **prompted(sampler="heun", schedule="beta", shift=1, neg="ugly", use_neg=True),
        "settings": "comfyui",
    },
    stored_as="GGUF Q4_K",
)
ODD_SAMPLING: Final = changed(
    request={**prompted(sampler=3, schedule=["beta"], shift="much", use_neg="yes"), "settings": None},
    stored_as=[1],
)
ODD: Final = changed(
    request={
        **prompted(prompt="\\ \t\r\u2028 é 猫 😀 \x7f", seed=2**63 - 1, guidance_scale=10**301, sample_steps=20.0),
        "loras": [1, {"path": 3}, {"path": "a\\b/", "network_multiplier": "much"}, {"path": "x.SFT"}],
        "output": {"format": 3, "quality": 1e16},
        "profile": None,
        "noise_draw": ["x"],
        "trainer": {"10": 0.1 + 0.2, "9": 1e-5, "a.b": 123456789.0, "e": 1.5e-7, "f": True, "g": -0.0, "h": 1e22},
        "more": {"empty": [], "none": {}, "text": 'a"b\\c\n\x1f/', "nested": [[1, 2.5], {"2": None, "1": False}]},
    },
    versions={"chromarpc": 3, "b": 1.0, "\U0001f600": "x", "\uffee": "y"},
    adapters=[3, {"sha256": 1, "placement": 2}],
    tokens={"used": [1], "cut": []},
    device=None,
)
GRAPHS: Final[dict[str, dict[str, Any]]] = {
    "graph-of-circles.png": {
        "1": {"class_type": "KSampler", "inputs": {"steps": ["1", 0], "cfg": ["2", 0], "positive": ["1", 0]}},
        "2": {"class_type": "X", "inputs": {"value": ["2", 0], "model": ["2", 0]}},
    },
    "graph-of-odd-values.png": {
        "1": {"class_type": "KSampler", "inputs": {"steps": True, "cfg": "x", "positive": 3, "model": ["1", 0]}},
        "2": {"class_type": "KSampler", "inputs": {}},
    },
    "graph-without-sampler.png": {"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
    "graph-of-one-node.png": {
        "10": {
            "class_type": "Sampler",
            "inputs": {"steps": 8.0, "cfg": 10**400, "positive": [3, 0], "seed": 2**64, "latent_image": ["3", 1],
                       "model": ["2", 0], "negative": ["4", 0], "sampler_name": "dpmpp_2m", "denoise": 1},
        },
        "3": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["5", 0], "width": 1,
                                                       "height": 2.5}},
        "5": {"class_type": "Encode", "inputs": {"t5xxl": "an ångström"}},
        "4": {"class_type": "ConditioningZeroOut", "inputs": {}},
        "2": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "c\\Chroma.Q8.gguf", "model": ["6", 0]}},
        "6": {"class_type": "LoraLoader", "inputs": {"lora_name": "b", "strength_model": -1}},
    },
}  # fmt: skip


def recorded(record: Any, file_format: str = "PNG", image: Image.Image | None = None) -> bytes:
    """A picture of this service, as the server writes it."""
    text = record if isinstance(record, str) else json.dumps(record)
    if file_format == "PNG":
        return png_with({"parameters": "for people", "chromarpc": text}, image)
    return saved(image or pixels(), file_format, xmp=_xmp(text))


def _xmp(text: str) -> bytes:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<r xmlns:c="urn:chromarpc:picture"><c:record>{escaped}</c:record></r>'.encode()


def extended(record: dict[str, Any], *, missing: bool = False) -> bytes:
    """A JPEG whose record lies in two segments, the second first."""
    text = _xmp(json.dumps(record))
    name = hashlib.md5(text, usedforsecurity=False).hexdigest().upper().encode()
    segments = b""
    for offset, part in ((300, text[300:]), *(() if missing else ((0, text[:300]),))):
        body = b"http://ns.adobe.com/xmp/extension/\0" + name + struct.pack(">II", len(text), offset) + part
        segments += b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    plain = saved(pixels(), "JPEG")
    return plain[:2] + b"\xff" + segments + plain[2:]  # with a byte of filling


def made() -> dict[str, bytes]:
    """Pictures by their names, made anew."""
    changes = changed(request=prompted(seed=43, guidance_scale=3.0))
    old = {"request": changed()["request"], "client_version": "0.0.9"}
    found = {
        "ours.png": recorded(RECORD),
        "ours-changed.jpg": recorded(changes, "JPEG"),
        "ours-preview.webp": recorded(PREVIEW, "WEBP", pixels(size=(80, 64))),
        "ours-preview-bfloat16.webp": recorded(SAME_PREVIEW, "WEBP", pixels(size=(80, 64))),
        "ours-without-adapter.png": recorded(changed(request={"loras": []}, adapters=[])),
        "ours-odd.png": recorded(ODD),
        "ours-old.png": recorded(old),
        "ours-sampled.png": recorded(SAMPLED),
        "ours-odd-sampling.png": recorded(ODD_SAMPLING),
        "ours-sampled-lost.png": png_with(
            {
                "parameters": "a cat\nNegative prompt: ugly\nSteps: 8, Sampler: heun, Schedule type: beta, "
                "CFG scale: 4.0, Seed: 42, Size: 64x64, Model: chroma, Shift: 1, Profile: reference, "
                "Settings: comfyui, Version: chromarpc 0.1.0"
            }
        ),
        "ours-resized.png": recorded(RECORD, image=pixels(size=(32, 64))),
        "ours-extended.jpg": extended(changed()),
        "ours-cut.jpg": extended(changed(), missing=True),
        "ours-lost.png": png_with(
            {
                "parameters": "a cat, <lora:x:1>\nSteps: 25, CFG scale: 4.0, Seed: 42, Size: 64x64, "
                "Model: chroma, Lora 0: a/b x 1.safetensors x 0.5, Profile: reference, "
                'Odd: "a, \\"b\\"", Version: chromarpc 0.1.0'
            }
        ),
        "broken-record.png": png_with({"chromarpc": '{"request": [', "parameters": A1111}),
        "no-request.png": recorded("[1]"),
        "plain.png": saved(pixels(), "PNG"),
        "1795648942091__000000000_1.jpg": saved(pixels(), "JPEG"),
        "comfyui.png": png_with({"prompt": COMFYUI, "workflow": "{}"}),
        "comfyui.webp": comfyui_webp(COMFYUI),
        "comfyui-custom.png": png_with({"prompt": COMFYUI_CUSTOM}, pixels(size=(128, 64)), compressed=True),
        "workflow.png": png_with({"prompt": "{NaN", "workflow": WORKFLOW}),
        "a1111.png": png_with({"parameters": A1111}, compressed=True),
        "a1111.jpg": with_comment(A1111.replace("circle", "cïrcle 猫"), "JPEG"),
        "forge.webp": with_comment(FORGE, "WEBP", big_endian=False),
        "latin-1.png": png_of(chunk(b"tEXt", b"parameters\0caf\xe9\x85\nSteps: 3, CFG scale: nan, Seed: 1_0")),
        "utf-8.png": png_of(chunk(b"tEXt", "parameters\0\xa0é \nSteps: 3, CFG scale: 1_0e0, Seed: ٣".encode())),
        "odd-hashes.png": png_with(
            {
                "parameters": "a <lora:ink:0.5> <lyco:b:te=1:unet=-.5> <lora:c:x>\nSteps: 3, "
                'Lora hashes: "ink: a: b, c", Seed: 4, Model: dir\\m.gguf, Denoising strength: 0.5, Version: neo'
            }
        ),
        "compressed-unicode.png": png_with({"parameters": "猫\nSteps: 1, Sampler: DPM++ 2M"}, compressed=True),
        **{name: png_with({"prompt": graph}) for name, graph in GRAPHS.items()},
    }
    for number, (data, _) in enumerate(HOSTILE):
        if len(data) < LARGEST_CASE_BYTES:
            found[f"hostile-{number}.png"] = data
    return found


def said(pictures: dict[str, bytes]) -> dict[str, Any]:
    """What this package says of pictures."""
    opened: dict[str, OpenedPicture] = {}
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in pictures.items():
            path = Path(folder, name)
            path.write_bytes(data)
            try:
                opened[name] = replace(open_picture(path), path=Path(name))
            except NoPicture as error:
                cases[name] = {"error": f"{error}"}
                continue
            facts = opened[name].facts
            cases[name] = {
                "lines": list(itertools.takewhile(bool, _explanation(opened[name], None))),
                "request": None
                if facts.request is None
                else json.dumps(facts.request, indent=2, ensure_ascii=False),
                "urls": list(facts.urls),
            }
    return {"pictures": cases, "comparisons": [_compared(opened[one], opened[other]) for one, other in COMPARED]}


def _compared(one: OpenedPicture, other: OpenedPicture) -> dict[str, Any]:
    fields = compare_facts(one.facts, other.facts)
    told, everything = (
        list(
            itertools.takewhile(
                lambda line: not line.startswith("pixels: "),
                _comparison(one, other, fields, PixelComparison(None), show_all),
            )
        )
        for show_all in (False, True)
    )
    return {"first": f"{one.path}", "second": f"{other.path}", "told": told, "all": everything}


def main() -> None:
    """Writes the file."""
    pictures = made()
    text = io.StringIO()
    files = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    json.dump({"files": files, **said(pictures)}, text, indent=1, ensure_ascii=True)
    FILE.write_text(f"{text.getvalue()}\n", encoding="utf-8")
    sys.stderr.write(f"{FILE.name}: {FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
