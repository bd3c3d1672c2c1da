"""Pixels to files: what each format's bytes are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chromarpc_server.domain.plan import PlannedOutput
from chromarpc_server.domain.requests import ImageFormat
from chromarpc_server.jobs.encoding import encode_image
from chromarpc_server.runtime.work import RenderedImage

PIXELS = np.random.default_rng(7).integers(0, 256, (48, 80, 3), np.uint8)


def _pillow(file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("output", "media_type", "wanted"),
    [
        (PlannedOutput(ImageFormat.JPEG_TRAINER, 75), "image/jpeg", _pillow("JPEG")),
        (PlannedOutput(ImageFormat.JPEG, 95), "image/jpeg", _pillow("JPEG", quality=95)),
        (PlannedOutput(ImageFormat.WEBP, 80), "image/webp", _pillow("WEBP", quality=80)),
    ],
)
def test_a_file_is_byte_for_byte_what_pillow_writes(output: PlannedOutput, media_type: str, wanted: bytes) -> None:
    header, data = encode_image(RenderedImage(0, 42, PIXELS), output)
    assert data == wanted
    assert (header.media_type, header.size_bytes, header.width, header.height) == (media_type, len(data), 80, 48)


def test_the_trainers_jpeg_halves_colour_both_ways_and_says_nothing_else() -> None:
    _, data = encode_image(RenderedImage(0, 42, PIXELS), PlannedOutput(ImageFormat.JPEG_TRAINER, 75))
    with Image.open(io.BytesIO(data)) as picture:
        assert {kind for kind, _ in picture.applist} == {"APP0"}  # type: ignore[attr-defined]
        assert [layer[1:3] for layer in picture.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
