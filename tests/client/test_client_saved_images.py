"""What the client saves: a file that is whole, holds its record, and can be drawn again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chromarpc import Client, Lora, Prompt, parse_request_json
from chromarpc.png_text import read as read_png_text
from chromarpc.request import build_request
from tests.client.client_fake_server import FakeServer, png


def test_a_saved_png_holds_its_pixels_and_its_record(server: FakeServer, client: Client, tmp_path: Path) -> None:
    (image,) = client.generate_images(
        "[trigger] a cät", trigger_word="sks", loras="j/l.safetensors", model="chroma"
    )
    saved = image.save(tmp_path / "a.png").read_bytes()
    end = image.data.index(b"IEND") - 4
    assert saved.startswith(image.data[:end])
    assert saved.endswith(image.data[end:])

    from PIL import Image

    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.tobytes() == image.image.tobytes()
        texts = picture.text
    assert texts == read_png_text(saved)
    assert texts["parameters"].startswith("sks a cät\nSteps: 2, ")
    record = json.loads(texts["chromarpc"])
    assert record == image.record()
    assert record["model_revision"] == "cd" * 32
    assert record["adapters"][0]["sha256"] == "ab" * 32
    assert record["versions"] == {"torch": "2.13.0"}
    again = parse_request_json(json.dumps(record["request"]))
    assert again.unknown == ()
    assert again.request == build_request(
        Prompt(
            "sks a cät",
            width=32,
            height=32,
            sample_steps=2,
            guidance_scale=4.0,
            seed=42,
            sampler="flowmatch",
            schedule="flowmatch",
        ),
        model="chroma",
        loras=Lora("j/l.safetensors", 0.5),
        output_format="png",
        profile="reference",
        noise_draw="float32",
    )


def test_a_file_is_replaced_whole_or_not_at_all(client: Client, tmp_path: Path) -> None:
    (image,) = client.generate_images("a")
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    target.chmod(0o600)
    image.save(target)
    assert target.read_bytes() == image.file_bytes()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        image.save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder"]


@pytest.mark.parametrize("data", [b"", b"GIF89a", png()[:20], png()[:-12]])
def test_text_goes_into_nothing_but_a_whole_png(data: bytes) -> None:
    from chromarpc import png_text

    with pytest.raises(ValueError, match="PNG"):
        png_text.insert(data, {"a": "b"})
    with pytest.raises(ValueError, match="PNG"):
        png_text.read(data)
