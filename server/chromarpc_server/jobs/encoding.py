"""Pixels to files: PNG, JPEG or WebP, and their split into chunks."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from PIL import Image

from chromarpc_server.domain.events import ImageChunk, ImageHeader, Preview
from chromarpc_server.domain.plan import PlannedOutput
from chromarpc_server.domain.requests import ImageFormat
from chromarpc_server.jobs.picture_files import with_record
from chromarpc_server.jobs.picture_record import PictureRecord
from chromarpc_server.runtime.work import Pixels, RenderedImage, RenderedPreview

_T = TypeVar("_T")

CHUNK_BYTES = 128 * 1024
"""What each stream may have on its way at once. A thousand watchers of an image of 3 MB hold 26 MB; with chunks
of 1 MiB they held 570 MB and it took 2.7 times as long; with chunks of 64 KiB, 1.4 times as long."""
PNG_COMPRESS_TYPE = zlib.Z_RLE
"""Looks for runs of one byte only, which is what filtered pixels repeat: as small as level 4 of zlib's usual
strategy, in 0.4 to 0.7 of its time. Its level changes nothing, see docs/performance-notes.md."""


def encode_pixels(pixels: Pixels, output: PlannedOutput) -> bytes:
    """The file's bytes; JPEG and WebP as Pillow writes them, at the plan's quality or by its defaults."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    match output.format:
        case ImageFormat.PNG:
            image.save(buffer, "PNG", compress_level=1, compress_type=PNG_COMPRESS_TYPE)
        case ImageFormat.JPEG:
            image.save(buffer, "JPEG", quality=output.quality)
        case ImageFormat.WEBP:
            image.save(buffer, "WEBP", quality=output.quality)
        case ImageFormat.JPEG_TRAINER:
            image.save(buffer, "JPEG")
    return buffer.getvalue()


def encode_image(
    image: RenderedImage, output: PlannedOutput, record: PictureRecord | None = None
) -> tuple[ImageHeader, bytes]:
    """A finished image's header and bytes, which carry the record, if any."""
    data = encode_pixels(image.pixels, output)
    if record is not None:
        data = with_record(data, output.format, record)
    height, width, _ = image.pixels.shape
    header = ImageHeader(
        prompt_index=image.prompt_index,
        media_type=output.format.media_type,
        size_bytes=len(data),
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        seed=image.seed,
    )
    return header, data


def split_chunks(prompt_index: int, data: bytes) -> Iterator[ImageChunk]:
    """The bytes in order, `CHUNK_BYTES` at a time."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield ImageChunk(prompt_index, offset, data[offset : offset + CHUNK_BYTES])


def encode_preview(preview: RenderedPreview) -> Preview:
    """A preview as a PNG: at these sizes smaller than a millisecond's work."""
    output = PlannedOutput(format=ImageFormat.PNG, quality=100)
    height, width, _ = preview.pixels.shape
    return Preview(
        prompt_index=preview.prompt_index,
        step=preview.step,
        media_type=ImageFormat.PNG.media_type,
        width=width,
        height=height,
        data=encode_pixels(preview.pixels, output),
    )


class ImageEncoder:
    """Encodes on threads of its own, so that neither devices nor the event loop wait. Lives on the event loop.

    A job has one thread at a time and its pixels' order, so there are no more threads at work than jobs, which
    are as many as devices; and no more than the machine has cores.
    """

    def __init__(self) -> None:
        """Starts nothing; a thread begins where none is idle."""
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="image-encoder")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By job, as long as it has something to encode."""

    async def image(
        self, job_id: str, image: RenderedImage, output: PlannedOutput, record: PictureRecord | None
    ) -> tuple[ImageHeader, bytes]:
        """See `encode_image`; after what was given before for the same job."""
        return await self._run(job_id, partial(encode_image, image, output, record))

    async def preview(self, job_id: str, preview: RenderedPreview) -> Preview:
        """See `encode_preview`; after what was given before for the same job."""
        return await self._run(job_id, partial(encode_preview, preview))

    def close(self) -> None:
        """Lets the threads end once they have done what they were given."""
        self._threads.shutdown(wait=False)

    async def _run(self, job_id: str, encode: Callable[[], _T]) -> _T:
        turn = self._turns.get(job_id)
        if turn is None:
            turn = self._turns[job_id] = asyncio.Lock()
        async with turn:  # which is given in the order in which it was asked for
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
