"""What pictures say of themselves: each kind of file, and what hostile ones may not do."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from chromarpc.pictures.comparison import compare_facts, compare_pixels
from chromarpc.pictures.files import NoPicture, read_picture
from chromarpc.pictures.opened import open_picture
from chromarpc.pictures.recorded import recorded_facts
from chromarpc.pictures.xmp import recorded_text
from tests.client.picture_files import HOSTILE, chunk, pixels, png_of, png_with, saved, with_comment

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


@pytest.mark.parametrize(("data", "said"), HOSTILE)
def test_what_is_no_picture_is_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(NoPicture, match=said):
        read_picture(data)


@pytest.mark.slow
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
