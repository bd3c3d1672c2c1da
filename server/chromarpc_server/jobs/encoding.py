"""Pixels to files: PNG, JPEG or WebP, and their split into chunks."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

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
    """Encodes on a thread of its own, so that neither the device nor the event loop waits."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-encoder")

    async def image(
        self, image: RenderedImage, output: PlannedOutput, record: PictureRecord | None
    ) -> tuple[ImageHeader, bytes]:
        """See `encode_image`."""
        return await self._run(partial(encode_image, image, output, record))

    async def preview(self, preview: RenderedPreview) -> Preview:
        """See `encode_preview`."""
        return await self._run(partial(encode_preview, preview))

    def close(self) -> None:
        """Lets the thread end once it has done what it was given."""
        self._thread.shutdown(wait=False)

    async def _run(self, encode: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)
