"""One run on a host: pixels become files there, with their records, so that no pixels cross the network."""

from __future__ import annotations

import asyncio
import time

from chromarpc_server.domain.events import Prepared
from chromarpc_server.jobs.encoding import ImageEncoder
from chromarpc_server.jobs.picture_record import picture_record
from chromarpc_server.pipeline import translate_memory_error
from chromarpc_server.runtime.work import Emit, EncodedImage, RenderedImage, RenderedPreview, Report, Work


class Drawing:
    """Takes what the device reports, and hands it on. Lives on the event loop."""

    def __init__(self, work: Work, device_dtype: str, encoder: ImageEncoder, emit: Emit) -> None:
        """Begins with nothing.

        Args:
            work: what is drawn.
            device_dtype: what the device computes in, for the images' records.
            encoder: makes files of pixels.
            emit: takes everything, with files instead of pixels.
        """
        self._job_id, self._plan = work.id, work.plan
        self._device_dtype = device_dtype
        self._encoder = encoder
        self._emit = emit
        self._prepared: Prepared | None = None
        self._encodings: list[asyncio.Task[None]] = []

    def take(self, report: Report) -> None:
        """The device has something to report."""
        match report:
            case RenderedImage() | RenderedPreview():
                self._encodings.append(asyncio.create_task(self._encode(report)))
                return
            case Prepared():
                self._prepared = report
        self._emit(report)

    async def finish(self) -> None:
        """Returns once all files were handed on.

        Raises:
            OutOfMemory, Exception: what encoding one of them ended with.
        """
        try:
            await asyncio.gather(*self._encodings)
        except Exception as error:  # noqa: BLE001 - only what it means is changed
            raise translate_memory_error(error) or error from None

    async def give_up(self) -> None:
        """Hands on no more."""
        for encoding in self._encodings:
            encoding.cancel()
        await asyncio.gather(*self._encodings, return_exceptions=True)

    async def _encode(self, report: RenderedImage | RenderedPreview) -> None:
        began = time.monotonic()
        if isinstance(report, RenderedPreview):
            self._emit(await self._encoder.preview(self._job_id, report))
            return
        record = None
        if self._prepared is not None and self._plan.output.picture_record:
            record = picture_record(
                self._plan, report.prompt_index, self._prepared, device_dtype=self._device_dtype
            )
        header, data = await self._encoder.image(self._job_id, report, self._plan.output, record)
        self._emit(EncodedImage(header, data, time.monotonic() - began))
