"""Pixels to files: what each format's bytes are."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chromarpc_server.domain.plan import PlannedOutput
from chromarpc_server.domain.requests import ImageFormat
from chromarpc_server.jobs import encoding
from chromarpc_server.jobs.encoding import ImageEncoder, encode_image
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


class _Held:
    """Encodes an image once it may; says what is being encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: SimpleQueue[int] = SimpleQueue()
        self.may = {seed: threading.Event() for seed in range(4)}
        monkeypatch.setattr(encoding, "encode_image", self)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def __call__(self, image: RenderedImage, *_: object) -> int:
        self.begun.put(image.seed)
        assert self.may[image.seed].wait(30)
        return image.seed


def test_jobs_are_encoded_side_by_side_and_each_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held(monkeypatch)
    done: list[Any] = []

    async def encode(encoder: ImageEncoder, job_id: str, seed: int) -> None:
        image = RenderedImage(0, seed, PIXELS)
        done.append(await encoder.image(job_id, image, PlannedOutput(ImageFormat.PNG, 100), None))

    async def run() -> None:
        encoder = ImageEncoder()
        given = [("one", 0), ("one", 1), ("one", 2), ("other", 3)]
        tasks = [asyncio.create_task(encode(encoder, *each)) for each in given]
        begun = {await asyncio.to_thread(held.begun.get) for _ in range(2)}
        assert begun == {0, 3}, "a job's second image is not begun before its first one is done"
        for seed in (2, 1, 3):
            held.may[seed].set()
        await tasks[3]
        assert done == [3]
        held.may[0].set()
        await asyncio.gather(*tasks)
        encoder.close()

    asyncio.run(run())
    assert done == [3, 0, 1, 2]


def test_no_more_threads_encode_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held(monkeypatch)

    async def run() -> None:
        encoder = ImageEncoder()
        output = PlannedOutput(ImageFormat.PNG, 100)
        images = [RenderedImage(0, seed, PIXELS) for seed in range(4)]
        calls = [asyncio.create_task(encoder.image(f"{image.seed}", image, output, None)) for image in images]
        assert {await asyncio.to_thread(held.begun.get) for _ in range(2)} == {0, 1}
        assert held.begun.empty()
        for may in held.may.values():
            may.set()
        await asyncio.gather(*calls)
        encoder.close()

    asyncio.run(run())
