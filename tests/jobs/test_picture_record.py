"""What a picture's record says, what it never says, and how it lies in each kind of file."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chromarpc.json_request import parse_request_json
from chromarpc_server.domain.events import AdapterReport, Prepared, TokenCount, WeightsReport, WeightsSource
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPrompt, PlanWarning
from chromarpc_server.domain.requests import (
    GenerationRequest,
    ImageFormat,
    NoiseDraw,
    OutputRequest,
    PromptRequest,
)
from chromarpc_server.domain.resolve import PictureRecords, Serving, resolve
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.trainer import LokrForm, TrainerSettings
from chromarpc_server.jobs.encoding import encode_image, encode_pixels
from chromarpc_server.jobs.picture_record import PictureRecord, picture_record
from chromarpc_server.runtime.work import RenderedImage
from chromarpc_server.settings import ServerSettings
from chromarpc_server.transport.messages.requests import generation_request

PIXELS = np.random.default_rng(7).integers(0, 256, (48, 80, 3), np.uint8)
SHA256 = "ab" * 32


def plan(**changes: Any) -> Plan:
    known: dict[str, Any] = {
        "model": "chroma",
        "served_model": "chroma-mini",
        "profile": "preview",
        "noise_draw": NoiseDraw.LEGACY,
        "prompts": (PlannedPrompt('a <cät> & "dog"\n', 64, 96, 3, 4.0, 7, neg="ugly"),),
        "loras": (PlannedLora("job/l.safetensors", 0.5),),
        "output": PlannedOutput(ImageFormat.PNG, 95, picture_record=True),
        "preview": None,
        "warnings": (PlanWarning("SIZE_SNAPPED", "prompts.0.width", "95 was floored"),),
        "request_id": "11111111-2222-3333-4444-555555555555",
        "trainer": TrainerSettings(qtype="int8", lokr_form=LokrForm.WEIGHT),
    }
    return Plan(**known | changes)


def prepared(count: int = 1, **changes: Any) -> Prepared:
    report = AdapterReport(
        path="job/l.safetensors",
        sha256=SHA256,
        format="ai-toolkit LoRA",
        network_multiplier=0.5,
        rank=16,
        matched_keys=8,
        unmatched_keys=("secret key",),
        metadata={"ss_output_dir": "/home/anna/loras", "training_info": "{}"},
    )
    known: dict[str, Any] = {
        "adapters": (report,) * count,
        "model_revision": "cd" * 32,
        "token_counts": (TokenCount(9, 0),),
        "versions": {"torch": "2.13.0+cu130", "chromarpc": "0.1.0"},
        "device": "NVIDIA H100 80GB HBM3",
        "weights": WeightsReport(WeightsSource.BUILT, 5, 1.5, 1, 1000),
        "warnings": (),
    }
    return Prepared(**known | changes)


def record(which: Plan | None = None, what: Prepared | None = None) -> PictureRecord:
    return picture_record(which or plan(), 0, what or prepared(), device_dtype="bfloat16")


def test_a_record_holds_all_that_decided_the_picture() -> None:
    said = json.loads(record().text)
    assert said == {
        "version": 1,
        "request": {
            "model": "chroma",
            "loras": [{"path": "job/l.safetensors", "network_multiplier": 0.5}],
            "prompts": [
                {
                    "prompt": 'a <cät> & "dog"\n',
                    "width": 64,
                    "height": 96,
                    "sample_steps": 3,
                    "guidance_scale": 4.0,
                    "seed": 7,
                    "neg": "ugly",
                    "use_neg": True,
                    "sampler": "flowmatch",
                    "schedule": "flowmatch",
                }
            ],
            "output": {"format": "IMAGE_FORMAT_PNG"},
            "profile": "preview",
            "noise_draw": "NOISE_DRAW_LEGACY",
            "trainer": {
                "quantize": True,
                "qtype": "int8",
                "quantize_te": True,
                "dtype": "bfloat16",
                "lokr_form": "LOKR_FORM_WEIGHT",
            },
        },
        "model": "chroma",
        "served_model": "chroma-mini",
        "model_revision": "cd" * 32,
        "adapters": [
            {
                "path": "job/l.safetensors",
                "sha256": SHA256,
                "network_multiplier": 0.5,
                "format": "ai-toolkit LoRA",
                "rank": 16,
                "placement": "merged",
                "matched_key_count": 8,
                "unmatched_key_count": 1,
            }
        ],
        "tokens": {"used": 9, "cut": 0},
        "tiled": False,
        "versions": {"chromarpc": "0.1.0", "torch": "2.13.0+cu130"},
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
    }
    assert record().text.isascii()


@pytest.mark.parametrize(("guidance", "said"), [(4.0, True), (1.0, None)])
def test_a_record_says_that_two_devices_made_a_pass_each(guidance: float, said: bool | None) -> None:
    which = plan(prompts=(PlannedPrompt("x", 64, 64, 1, guidance, 1),))
    on_one = json.loads(record(which).text)
    on_two = json.loads(record(which, prepared(second_device="cuda:1", device_id="cuda:0+cuda:1")).text)
    assert on_two.pop("guidance_on_two_devices", None) is said
    assert on_two == on_one


def test_a_record_names_what_its_picture_was_sampled_with() -> None:
    prompt = PlannedPrompt("x", 64, 64, 8, 1.5, 1, sampler="heun", schedule="beta", shift=1.0)
    made = record(
        plan(prompts=(prompt,), profile="reference", trainer=None, settings=DrawingSettings.COMFYUI),
        prepared(stored_as="GGUF Q4_K"),
    )
    said = json.loads(made.text)
    assert said["request"]["settings"] == "comfyui"
    assert said["request"]["prompts"] == [
        {
            "prompt": "x",
            "width": 64,
            "height": 64,
            "sample_steps": 8,
            "guidance_scale": 1.5,
            "seed": 1,
            "sampler": "heun",
            "schedule": "beta",
            "shift": 1.0,
        }
    ]
    assert said["stored_as"] == "GGUF Q4_K"
    assert "Sampler: heun, Schedule type: beta, " in made.parameters
    assert ", Shift: 1, Profile: reference, Settings: comfyui, Version" in made.parameters


def test_a_records_request_draws_the_same_again() -> None:
    prompt = PromptRequest("x", neg="ugly", use_neg=True, sampler="heun", schedule="beta", shift=1.0)
    planned = resolve(GenerationRequest("chroma", prompts=(prompt,), settings="comfyui"), Serving())
    body = json.loads(record(replace(planned, loras=plan().loras)).text)["request"]
    again = resolve(generation_request(parse_request_json(json.dumps(body)).request), Serving())
    assert again.prompts == planned.prompts
    assert again.settings is planned.settings


def test_what_happened_to_come_differently_gives_the_same_record() -> None:
    other = prepared(
        weights=WeightsReport(WeightsSource.SWITCHED, 0, 0.1, 4, 5000),
        versions={"chromarpc": "0.1.0", "torch": "2.13.0+cu130"},
    )
    assert record(plan(request_id=None, detached=True, warnings=()), other) == record()
    two = plan(prompts=(PlannedPrompt("x", 64, 64, 1, 1.0, 1), *plan().prompts))
    counts = (TokenCount(2, 0), TokenCount(9, 0))
    assert picture_record(two, 1, prepared(token_counts=counts), device_dtype="bfloat16") == record()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://anna:pass@example.org:8443/a/l.safetensors?token=hf_secret#part",
         "https://example.org:8443/a/l.safetensors"),
        ("HTTPS://example.org/l.safetensors?download=true", "https://example.org/l.safetensors"),
        ("https://user@[2001:db8::1]/l.safetensors", "https://[2001:db8::1]/l.safetensors"),
        ("https://example.org:port/l.safetensors", f"sha256:{SHA256}"),
        (f"sha256:{SHA256}", f"sha256:{SHA256}"),
        ("/home/anna/l.safetensors", f"sha256:{SHA256}"),
        ("~/l.safetensors", f"sha256:{SHA256}"),
        (r"C:\loras\l.safetensors", f"sha256:{SHA256}"),
        (r"\\nas\l.safetensors", f"sha256:{SHA256}"),
        ("job/l.safetensors", "job/l.safetensors"),
    ],
)  # fmt: skip
def test_no_secret_and_no_place_of_a_machine_is_in_a_record(path: str, said: str) -> None:
    made = record(plan(loras=(PlannedLora(path, 0.5),)))
    known = json.loads(made.text)
    assert known["request"]["loras"][0]["path"] == known["adapters"][0]["path"] == said
    assert f"Lora 0: {said} x 0.5" in made.parameters.replace('"', "")
    for planted in ("anna", "secret", "hf_", "nas", "ss_output_dir", "training_info"):
        assert planted not in made.text + made.parameters


def test_people_read_prompt_negative_text_and_settings() -> None:
    assert record().parameters == (
        'a <cät> & "dog"\n\nNegative prompt: ugly\nSteps: 3, Sampler: flowmatch, Schedule type: flowmatch, '
        "CFG scale: 4, Seed: 7, Size: 64x96, Model: chroma-mini, Model hash: cdcdcdcdcdcd, "
        "Lora 0: job/l.safetensors x 0.5, "
        "Profile: preview, Version: chromarpc 0.1.0"
    )


FORMATS = [
    (ImageFormat.PNG, "PNG"),
    (ImageFormat.JPEG, "JPEG"),
    (ImageFormat.JPEG_TRAINER, "JPEG"),
    (ImageFormat.WEBP, "WEBP"),
]


def _texts(data: bytes, kind: str) -> tuple[str, str]:
    """Record and text for people as Pillow finds them."""
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == kind
        if kind == "PNG":
            assert list(picture.text) == ["parameters", "chromarpc"]  # type: ignore[attr-defined]
            return picture.info["chromarpc"], picture.info["parameters"]
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment.startswith(b"UNICODE\0")
        xmp = picture.info["xmp"].decode()
        start, end = xmp.index("<chromarpc:record"), xmp.index("</chromarpc:record>")
        escaped = xmp[xmp.index(">", start) + 1 : end]
        text = escaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return text, comment[8:].decode("utf-16-be")


@pytest.mark.parametrize(("image_format", "kind"), FORMATS)
def test_other_programs_find_the_record_and_the_same_pixels(image_format: ImageFormat, kind: str) -> None:
    output = PlannedOutput(image_format, 90, picture_record=True)
    header, data = encode_image(RenderedImage(0, 7, PIXELS), output, record())
    plain = encode_pixels(PIXELS, output)
    assert header.size_bytes == len(data) > len(plain)
    assert _texts(data, kind) == (record().text, record().parameters)
    with Image.open(io.BytesIO(data)) as picture, Image.open(io.BytesIO(plain)) as bare:
        assert picture.size == bare.size
        assert picture.tobytes() == bare.tobytes()


@pytest.mark.parametrize(("image_format", "kind"), FORMATS)
def test_without_a_record_a_file_is_what_the_encoder_writes(image_format: ImageFormat, kind: str) -> None:
    output = PlannedOutput(image_format, 90)
    _, data = encode_image(RenderedImage(0, 7, PIXELS), output, None)
    assert data == encode_pixels(PIXELS, output)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.info.keys() & {"chromarpc", "parameters", "exif", "xmp"} == set()


@pytest.mark.parametrize("odd", [0, 1])
def test_a_webp_with_a_record_keeps_its_chunks_even(odd: int) -> None:
    made = PictureRecord("x" * (10 + odd), "y" * (4 + odd))
    _, data = encode_image(RenderedImage(0, 7, PIXELS), PlannedOutput(ImageFormat.WEBP, 90), made)
    assert len(data) == int.from_bytes(data[4:8], "little") + 8
    assert len(data) % 2 == 0
    assert _texts(data, "WEBP") == (made.text, made.parameters)


def test_a_record_larger_than_a_jpeg_segment_is_whole() -> None:
    prompt = replace(plan().prompts[0], prompt="ü" * 32_000)
    made = record(plan(prompts=(prompt,)))
    assert len(made.text) > 190_000
    _, data = encode_image(RenderedImage(0, 7, PIXELS), PlannedOutput(ImageFormat.JPEG, 90), made)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (80, 48)
        segments = [body for name, body in picture.applist if name == "APP1"]  # type: ignore[attr-defined]
    mark = b"http://ns.adobe.com/xmp/extension/\0"
    parts = [body[len(mark) :] for body in segments if body.startswith(mark)]
    assert len(parts) > 2
    assert all(part[32:36] == len(b"".join(p[40:] for p in parts)).to_bytes(4, "big") for part in parts)
    assert made.text.encode() in b"".join(part[40:] for part in parts)
    assert all(parts[0][:32] in body for body in segments if body.startswith(b"http://ns.adobe.com/xap/1.0/\0"))


# Who decides


def ask(record: bool | None, serving: Serving, image_format: ImageFormat | None = None) -> tuple[bool, list[str]]:
    made = resolve(
        GenerationRequest(
            model="chroma", prompts=(PromptRequest("a"),), output=OutputRequest(image_format, None, record)
        ),
        serving,
    )
    return made.output.picture_record, [w.code for w in made.warnings if w.field == "output.picture_record"]


LEFT_OUT = ["PICTURE_RECORD_LEFT_OUT"]


def test_a_request_and_the_server_decide_about_the_record() -> None:
    serving = Serving()
    assert ask(None, serving) == (True, [])
    assert ask(False, serving) == (False, [])
    assert ask(None, serving, ImageFormat.JPEG_TRAINER) == (False, [])
    assert ask(True, serving, ImageFormat.JPEG_TRAINER) == (True, [])
    off = Serving(picture_records=PictureRecords.OFF)
    assert ask(None, off) == (False, [])
    assert ask(True, off) == (False, LEFT_OUT)
    kept_out = Serving(picture_records=PictureRecords.KEPT_OUT)
    assert ask(None, kept_out) == ask(True, kept_out) == (False, LEFT_OUT)
    assert ask(False, kept_out) == ask(None, kept_out, ImageFormat.JPEG_TRAINER) == (False, [])


def test_settings_say_whether_pictures_carry_records() -> None:
    assert ServerSettings().picture_records() is PictureRecords.WRITTEN
    assert ServerSettings(picture_record=False).picture_records() is PictureRecords.OFF
    assert ServerSettings(store_prompts=False).picture_records() is PictureRecords.KEPT_OUT
    assert ServerSettings(store_prompts=False, store="memory").picture_records() is PictureRecords.WRITTEN
