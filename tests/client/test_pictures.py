"""What pictures say of themselves: each program's, each kind of file, and what hostile ones may not do."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from picture_files import (
    A1111,
    COMFYUI,
    COMFYUI_CUSTOM,
    FORGE,
    WORKFLOW,
    chunk,
    comfyui_webp,
    pixels,
    png_of,
    png_with,
    saved,
    with_comment,
)

from chromarpc import parse_request_json
from chromarpc.pictures import files
from chromarpc.pictures.a1111 import parameters_facts
from chromarpc.pictures.comfyui import comfyui_facts
from chromarpc.pictures.comparison import compare_facts, compare_pixels, difference_picture
from chromarpc.pictures.facts import ALWAYS_ASKED, PictureFacts, in_order
from chromarpc.pictures.files import NoPicture, read_picture
from chromarpc.pictures.opened import open_picture
from chromarpc.pictures.recorded import recorded_facts
from chromarpc.pictures.xmp import recorded_text

RECORD: dict[str, Any] = {
    "version": 1,
    "request": {
        "model": "chroma",
        "loras": [{"path": "job/l.safetensors", "network_multiplier": 1}],
        "prompts": [
            {
                "prompt": 'a <cät>\n& "dog"',
                "width": 64,
                "height": 64,
                "sample_steps": 25,
                "guidance_scale": 4.0,
                "seed": 42,
            }
        ],
        "output": {"format": "IMAGE_FORMAT_PNG"},
        "profile": "reference",
        "noise_draw": "NOISE_DRAW_FLOAT32",
    },
    "model": "chroma",
    "served_model": "chroma",
    "model_revision": "cd" * 32,
    "adapters": [{"path": "job/l.safetensors", "sha256": "ab" * 32, "placement": "merged"}],
    "tokens": {"used": 9, "cut": 0},
    "tiled": False,
    "versions": {"chromarpc": "0.1.0", "torch": "2.13.0"},
    "device": "NVIDIA H100 80GB HBM3",
    "dtype": "bfloat16",
}


def changed(*path: Any, to: Any) -> PictureFacts:
    """Facts of the record with one value changed."""
    record = json.loads(json.dumps(RECORD))
    at = record
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = to
    return recorded_facts(json.dumps(record))


def values(facts: PictureFacts | None) -> dict[str, Any]:
    assert facts is not None
    return {name: fact.value for name, fact in facts.facts.items()}


def differing(first: PictureFacts, second: PictureFacts) -> list[str]:
    return [f"{d.name}: {d.first} → {d.second}" for d in compare_facts(first, second) if d.differs]


# Texts in files


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("text", ["plain", "ä cät 猫"])
def test_every_kind_of_png_text_is_read(text: str, compressed: bool) -> None:
    found = read_picture(png_with({"parameters": text, "other": "x"}, compressed=compressed))
    assert (found.kind, found.width, found.height) == ("PNG", 64, 64)
    assert found.texts == {"parameters": text, "other": "x"}


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_a_users_comment_is_read_in_either_byte_order(file_format: str, big_endian: bool) -> None:
    data = with_comment("a cät 猫\nSteps: 3", file_format, big_endian=big_endian)
    found = read_picture(data)
    assert found.kind == {"JPEG": "JPEG", "WEBP": "WebP"}[file_format]
    assert found.texts == {"parameters": "a cät 猫\nSteps: 3"}


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_the_size_of_every_kind_of_webp_is_read(options: dict[str, Any]) -> None:
    found = read_picture(saved(pixels(size=(70, 50)), "WEBP", **options))
    assert (found.width, found.height) == (70, 50)


@pytest.mark.parametrize(
    "xmp",
    [
        '<r xmlns:chromarpc="urn:chromarpc:picture"><chromarpc:record>{}</chromarpc:record></r>',
        "<r xmlns:ns1='urn:chromarpc:picture' ns1:record='{}'/>",
        '<r xmlns:c="urn:chromarpc:picture" c:record="{}"/>',
        '<c:record xmlns:c="urn:chromarpc:picture">{}</c:record>',
    ],
)
def test_a_record_is_found_in_xmp_that_other_programs_wrote_anew(xmp: str) -> None:
    text = json.dumps({"a": "<b> & \"c\" 'd' ü"})
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&#62;").replace('"', "&quot;")
    assert recorded_text(xmp.replace("{}", escaped.replace("'", "&apos;"))) == text
    assert recorded_text(xmp.replace("urn:chromarpc:picture", "urn:other")) is None


def test_no_entity_of_xmp_is_expanded() -> None:
    bomb = (
        '<!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>'
        '<r xmlns:chromarpc="urn:chromarpc:picture"><chromarpc:record>&b;&c;&#x110000;</chromarpc:record></r>'
    )
    assert recorded_text(bomb) == "&b;&c;&#x110000;"


# Limits


def _bomb(kind: bytes) -> bytes:
    inflated = zlib.compress(b"a" * (files.MAX_TEXT_BYTES + 1), 9)
    head = b"parameters\0\0" if kind == b"zTXt" else b"parameters\0\x01\0\0\0"
    return png_of(chunk(kind, head + inflated))


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "is no PNG"),
    (b"GIF89a", "is no PNG"),
    (files.PNG_SIGNATURE, "broken"),
    (files.PNG_SIGNATURE + chunk(b"IEND", b""), "broken"),
    (files.PNG_SIGNATURE + chunk(b"tEXt", b"a\0b"), "broken"),
    (png_with({"a": "b"})[:-40], "cut short"),
    (png_of(struct.pack(">I", 2**31) + b"tEXt"), "cut short"),
    (_bomb(b"zTXt"), "more than"),
    (_bomb(b"iTXt"), "more than"),
    (png_of(*[chunk(b"tEXt", b"%d\0" % n + b"a" * 1_000_000) for n in range(9)]), "more than"),
    (png_of(chunk(b"zTXt", b"a\0\0no deflate")), "broken"),
    (png_of(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 100)[:-6])), "broken"),
    (saved(pixels(), "JPEG")[:100], "cut short"),
    (b"\xff\xd8\xff\xe1\x00\x01", "cut short"),
    (b"\xff\xd8\xff\xd9\x00\x02", "broken"),
    (b"\xff\xd8\xff", "broken"),
    (saved(pixels(), "WEBP")[:-9], "cut short"),
    (b"RIFF\x04\0\0\0WEBP", "broken"),
    (b"RIFF\xff\xff\xff\xffWEBP", "cut short"),
]


@pytest.mark.parametrize(("data", "said"), HOSTILE)
def test_what_is_no_picture_is_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(NoPicture, match=said):
        read_picture(data)


def test_a_bomb_takes_neither_time_nor_room() -> None:
    inflated = zlib.compress(b"\0" * 200_000_000, 9)
    bombs = png_of(*[chunk(b"zTXt", b"%d\0\0" % number + inflated) for number in range(50)])
    begun = time.process_time()
    with pytest.raises(NoPicture, match="more than"):
        read_picture(bombs)
    assert time.process_time() - begun < 1


def test_pixels_are_neither_inflated_nor_counted_to_read_texts() -> None:
    wide = png_of(chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"tEXt", b"a\0b"), width=2**31 - 1, height=9)
    assert read_picture(wide).texts == {"a": "b"}
    compared = compare_pixels(wide, wide)
    assert compared.similarity is None
    assert "cannot be compared" in compared.line


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x87\x69\0\4\0\0\0\1\0\0\0\x08" * 3,
        b"MM\0*\0\0\0\x08\0\1\x01\x0e\0\2\xff\xff\xff\xff\0\0\0\0",
        b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08",
    ],
)
def test_exif_that_makes_no_sense_says_nothing(exif: bytes) -> None:
    body = b"Exif\0\0" + exif
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    plain = saved(pixels(), "JPEG")
    assert read_picture(plain[:2] + segment + plain[2:]).texts == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"request": 1}',
        "[" * 100_000,
        '{"request": {"prompts": 1}}'.replace("1", "9" * 5000),
        "\ud800",
    ],
)
def test_a_record_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        png_of(chunk(b"iTXt", b"chromarpc\0\0\0\0\0" + text.encode("utf-8", "ignore")))
    )
    opened = open_picture(tmp_path / "a.png")
    assert opened.facts.program == ""
    assert "record cannot be read" in opened.facts.remarks[0]


@pytest.mark.parametrize(
    "request_",
    [{}, {"prompts": []}, {"prompts": ["a"]}, {"prompts": [{}], "loras": {"a": 1}, "output": 3, "trainer": "x"},
     {"loras": [1, {"path": 3}, {"path": "a", "network_multiplier": "much"}], "prompts": [{"seed": {"a": 1}}]}],
)  # fmt: skip
def test_a_record_of_odd_values_is_read_as_far_as_it_goes(request_: dict[str, Any]) -> None:
    facts = recorded_facts(json.dumps({"request": request_, "versions": [], "adapters": [3], "tokens": 4}))
    assert facts.get("model") is not None
    assert compare_facts(facts, facts)


def test_an_extended_xmp_with_a_missing_part_is_none() -> None:
    mark = b"http://ns.adobe.com/xmp/extension/\0"
    text = b'<r xmlns:c="urn:chromarpc:picture"><c:record>{}</c:record></r>'
    name = hashlib.md5(text).hexdigest().upper().encode()  # noqa: S324

    def jpeg(*parts: tuple[int, bytes]) -> bytes:
        segments = b""
        for offset, part in parts:
            body = mark + name + struct.pack(">II", len(text), offset) + part
            segments += b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        plain = saved(pixels(), "JPEG")
        return plain[:2] + segments + plain[2:]

    assert read_picture(jpeg((20, text[20:]), (0, text[:20]))).texts == {"chromarpc": "{}"}
    assert read_picture(jpeg((0, text[:20]))).texts == {}
    assert read_picture(jpeg((0, text[:20]), (20, text[20:-1] + b"x"))).texts == {}


# Programs


def test_a_picture_of_comfyui_is_followed_from_where_it_is_saved() -> None:
    facts = comfyui_facts({"prompt": json.dumps(COMFYUI), "workflow": "{}"})
    assert values(facts) == {
        "model": "Chroma1-HD.safetensors",
        "dtype": None,
        "loras.0.path": "styles/ink.safetensors",
        "loras.0.sha256": None,
        "loras.0.network_multiplier": 0.8,
        "loras.0.placement": None,
        "prompt": "a red circle",
        "neg": "blurry",
        "seed": 43,
        "noise_draw": None,
        "sample_steps": 20,
        "sampler": "euler",
        "scheduler": "beta",
        "guidance_scale": 3.5,
        "guidance": "classifier-free",
        "width": 64,
        "height": 64,
    }
    assert facts is not None
    assert facts.facts["scheduler"].note == "shift 1.0 (ModelSamplingAuraFlow)"
    assert facts.facts["loras.0.placement"].note


def test_samplers_of_several_nodes_and_lists_of_adapters_are_followed() -> None:
    facts = comfyui_facts({"prompt": json.dumps(COMFYUI_CUSTOM)})
    known = values(facts)
    assert (known["prompt"], known["neg"], known["seed"]) == ("a cat", "", 7)
    assert (known["sample_steps"], known["guidance_scale"], known["sampler"]) == (30, 4.0, "res_multistep")
    assert (known["model"], known["loras.0.path"], known["loras.0.network_multiplier"]) == (
        "chroma.safetensors",
        "a.safetensors",
        0.5,
    )
    assert "loras.1.path" not in known
    assert facts is not None
    assert any("denoise 0.6" in remark for remark in facts.remarks)
    assert any("res_multistep has no counterpart" in remark for remark in facts.remarks)


def test_a_workflow_alone_is_enough_for_what_its_nodes_list() -> None:
    known = values(comfyui_facts({"workflow": json.dumps(WORKFLOW)}))
    assert (known["prompt"], known["neg"], known["seed"], known["sample_steps"]) == ("a dog", "bad", 9, 12)
    assert (known["guidance_scale"], known["scheduler"], known["width"]) == (4.5, "simple", 64)
    assert known["model"] == "chroma.safetensors"


@pytest.mark.parametrize(
    "graph",
    [
        {"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
        {"1": {"class_type": "KSampler", "inputs": {"steps": ["1", 0], "cfg": ["2", 0], "positive": ["1", 0]}},
         "2": {"class_type": "X", "inputs": {"value": ["2", 0], "model": ["2", 0]}}},
        {"1": {"class_type": "KSampler", "inputs": {"steps": True, "cfg": "x", "positive": 3, "model": ["1", 0]}}},
        {str(n): {"class_type": "Y", "inputs": {"a": [str(n + 1), 0]}} for n in range(30_000)},
        {"1": {"class_type": 3, "inputs": {}}, "2": 4, "3": {"class_type": "SaveImage", "inputs": []}},
    ],
)  # fmt: skip
def test_graphs_that_lead_nowhere_or_in_circles_end(graph: dict[str, Any]) -> None:
    facts = comfyui_facts({"prompt": json.dumps(graph)})
    assert facts is None or facts.program == "ComfyUI"


def test_parameters_of_a1111_are_read_with_adapters_taken_out_of_the_prompt() -> None:
    facts = parameters_facts(A1111)
    assert values(facts) == {
        "prompt": "a red circle,  on white\nsecond line",
        "neg": "blurry,\nugly",
        "model": "Chroma1-HD",
        "model_revision": None,
        "sample_steps": 20,
        "sampler": "Euler",
        "scheduler": "Beta",
        "seed": 43,
        "guidance_scale": 3.5,
        "guidance": "classifier-free",
        "noise_draw": None,
        "profile": None,
        "width": 64,
        "height": 64,
        "loras.0.path": "ink",
        "loras.0.sha256": None,
        "loras.0.network_multiplier": 0.8,
        "loras.0.placement": None,
        "versions": "v1.10.1",
    }
    assert facts is not None
    assert "1a2b3c4d5e" in facts.facts["model_revision"].note
    assert "0123456789ab" in facts.facts["loras.0.sha256"].note
    assert facts.facts["noise_draw"].note == "drawn by CPU"


def test_parameters_of_forge_are_told_from_those_of_a1111() -> None:
    facts = parameters_facts(FORGE)
    assert facts is not None
    assert facts.program == "Forge f2.0.1v1.10.1-previous"
    assert values(facts)["loras.0.network_multiplier"] == 0.25
    assert "Distilled CFG Scale 3.5" in facts.facts["guidance"].note
    assert facts.facts["dtype"].note == "its weights are held as Automatic (fp16 LoRA)"


@pytest.mark.parametrize("hashes", ["ink: ", "ink", "ink: a: b", ":", '"', "ink: 1, ink: 2"])
def test_hashes_that_make_no_sense_leave_the_rest_as_it_is(hashes: str) -> None:
    facts = parameters_facts(f'a <lora:ink:0.5>\nSteps: 3, Lora hashes: "{hashes}", Seed: 4')
    assert facts is not None
    assert values(facts)["loras.0.network_multiplier"] == 0.5
    assert values(facts)["loras.0.sha256"] is None


@pytest.mark.parametrize("text", ["", "a cat", "Steps: many", "\n\n", "Negative prompt: x"])
def test_a_text_without_settings_is_none_of_parameters(text: str) -> None:
    assert parameters_facts(text) is None


def test_long_texts_of_parameters_take_no_time() -> None:
    begun = time.process_time()
    for text in ("Steps: 1, " + "a" * 500_000, 'Steps: 1, a: "' + "\\" * 100_000, "Steps: 1, " + "a:" * 200_000,
                 "<lora:" * 100_000 + "\nSteps: 1"):  # fmt: skip
        assert parameters_facts(text) is not None
    assert time.process_time() - begun < 2


# Comparing


def test_a_changed_field_is_one_line_by_the_requests_name() -> None:
    base = recorded_facts(json.dumps(RECORD))
    prompt = ("request", "prompts", 0)
    cases: list[tuple[tuple[Any, ...], Any, str]] = [
        ((*prompt, "guidance_scale"), 3.0, "guidance_scale: 4.0 → 3.0"),
        ((*prompt, "seed"), 43, "seed: 42 → 43"),
        ((*prompt, "sample_steps"), 30, "sample_steps: 25 → 30"),
        ((*prompt, "width"), 96, "width: 64 → 96"),
        ((*prompt, "neg"), "ugly", 'neg: "" → ugly'),
        (("served_model",), "chroma-mini", "model: chroma → chroma-mini"),
        (("model_revision",), "ef" * 32, f"model_revision: {'cd' * 32} → {'ef' * 32}"),
        (("adapters", 0, "sha256"), "ef" * 32, f"loras.0.sha256: {'ab' * 32} → {'ef' * 32}"),
        (("request", "loras", 0, "network_multiplier"), 0.5, "loras.0.network_multiplier: 1.0 → 0.5"),
        (("request", "loras"), [], "loras.0.path: job/l.safetensors → none"),
        (("request", "profile"), "fp8", "profile: reference → fp8"),
        (("request", "noise_draw"), "NOISE_DRAW_LEGACY", "noise_draw: float32 → legacy"),
        (("versions", "torch"), "2.11.0", "versions.torch: 2.13.0 → 2.11.0"),
        (("device",), "NVIDIA H200", "device: NVIDIA H100 80GB HBM3 → NVIDIA H200"),
    ]
    for path, value, line in cases:
        assert differing(base, changed(*path, to=value)) == [line]
    assert differing(base, changed("request", "loras", 0, "path", to="other/l.sft")) == []


def test_differences_come_in_the_order_of_how_much_they_explain() -> None:
    asked = ["device", "versions.torch", "neg", "loras.0.network_multiplier", "guidance_scale", "sample_steps",
             "noise_draw", "seed", "height", "width", "profile", "loras.10.sha256", "loras.2.sha256",
             "model_revision", "model"]  # fmt: skip
    assert in_order(asked) == [
        "model", "model_revision", "loras.2.sha256", "loras.10.sha256", "profile", "width", "height", "seed",
        "noise_draw", "sample_steps", "guidance_scale", "loras.0.network_multiplier", "neg", "versions.torch",
        "device",
    ]  # fmt: skip


def test_what_one_program_does_not_say_is_unknown_and_no_difference() -> None:
    ours = recorded_facts(json.dumps(RECORD))
    theirs = comfyui_facts({"prompt": json.dumps(COMFYUI)})
    assert theirs is not None
    found = {difference.name: difference for difference in compare_facts(ours, theirs)}
    assert set(ALWAYS_ASKED) <= found.keys()
    for name in ("model_revision", "profile", "noise_draw", "versions", "device", "loras.0.sha256"):
        assert found[name].second == "unknown"
        assert not found[name].differs
    assert found["versions"].first == "chromarpc 0.1.0, torch 2.13.0"
    assert not found["sampler"].differs  # Euler steps by another name
    assert found["scheduler"].differs
    assert found["guidance_scale"].line.startswith("guidance_scale: 4.0 → 3.5")


def test_pixels_are_measured_and_their_difference_drawn() -> None:
    one, other = saved(pixels((100, 100, 100)), "PNG"), saved(pixels((100, 104, 100)), "PNG")
    assert compare_pixels(one, one).line == "pixels: the same, and so is every byte"
    found = compare_pixels(one, other)
    assert found.similarity is not None
    assert found.similarity.largest_difference == 4
    assert found.similarity.psnr_db == pytest.approx(40.8599, abs=1e-3)
    assert difference_picture(one, other).getpixel((0, 0)) == (0, 32, 0)
    assert compare_pixels(one, saved(pixels(size=(32, 64)), "PNG")).sizes_differ


def test_what_would_draw_a_foreign_picture_is_a_request() -> None:
    for facts in (
        comfyui_facts({"prompt": json.dumps(COMFYUI)}),
        comfyui_facts({"prompt": json.dumps(COMFYUI_CUSTOM)}),
        comfyui_facts({"workflow": json.dumps(WORKFLOW)}),
        parameters_facts(A1111),
        parameters_facts(FORGE),
    ):
        assert facts is not None
        parsed = parse_request_json(json.dumps(facts.request))
        assert parsed.unknown == ()
        assert parsed.request.model == "chroma"
        assert parsed.request.prompts[0].seed == facts.facts["seed"].value


def test_the_files_own_size_counts_for_pictures_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_with({"prompt": COMFYUI}, pixels(size=(128, 64))))
    facts = open_picture(tmp_path / "a.png").facts
    assert facts.facts["width"].value == 128
    assert any("width is 128" in remark for remark in facts.remarks)
    (tmp_path / "b.webp").write_bytes(comfyui_webp(COMFYUI))
    assert open_picture(tmp_path / "b.webp").facts.facts["seed"].value == 43
