"""`LoraService`: the adapters that requests can name, and uploads of more."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator
from typing import Self

import grpc

from chromarpc.v1 import lora_service_pb2, lora_service_pb2_grpc
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.inspection import AdapterInspection, inspect_adapter
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.adapters.weight_norms import WeightNorms
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import (
    ChromaError,
    InvalidParameter,
    JobCancelled,
    LoraChanged,
    LoraDamaged,
    LoraError,
)
from chromarpc_server.domain.models import CHROMA, ModelSpec
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.domain.resolve import Serving, model_not_found
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.transport.messages.loras import inspection_message, stored_lora_message
from chromarpc_server.transport.messages.paging import Page, page_token, token_place
from chromarpc_server.transport.messages.values import timestamp

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FETCHING = 4
"""Downloads at once that are for inspections; others wait. Those of jobs are bounded by the queue."""
MAX_CHECKING = 2
"""Files at once that are read before an upload begins, to see whether they are whole; others wait."""

_ORDER = (LoraSource.ROOT, LoraSource.UPLOAD, LoraSource.DOWNLOAD)


class LoraServicer(lora_service_pb2_grpc.LoraServiceServicer):
    """Answers from the disk, in threads; never waits for the device."""

    def __init__(
        self, library: AdapterLibrary, sources: AdapterSources, serving: Serving, model_files: ModelFiles
    ) -> None:
        """`sources`: where adapters come from, of the library or of URLs; `serving`: which models there are."""
        self._library = library
        self._sources = sources
        self._serving = serving
        self._model_files = model_files
        self._inspecting = asyncio.Lock()
        """One at a time: each holds a whole file in memory."""
        self._fetching = asyncio.Semaphore(MAX_FETCHING)
        self._checking = asyncio.Semaphore(MAX_CHECKING)
        self._norms = WeightNorms()

    async def ListLoras(  # noqa: N802
        self,
        request: lora_service_pb2.ListLorasRequest,
        context: grpc.aio.ServicerContext[lora_service_pb2.ListLorasRequest, lora_service_pb2.ListLorasResponse],
    ) -> lora_service_pb2.ListLorasResponse:
        """Lists the adapters that this server has, page by page."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        if not 0 < size <= MAX_PAGE_SIZE:
            raise InvalidParameter(f"must be between 0 and {MAX_PAGE_SIZE}, got {size}", field="page_size")
        after = _token_position(request.page_token) if request.page_token else None
        listing = await asyncio.to_thread(self._library.listing, current_caller().name)
        rest = [lora for lora in listing.loras if after is None or _position(lora) > after]
        page = Page(size)
        listed = list(itertools.takewhile(page.takes, map(stored_lora_message, rest)))
        return lora_service_pb2.ListLorasResponse(
            loras=listed,
            next_page_token=page_token(_position(rest[len(listed) - 1])) if len(rest) > len(listed) else "",
            truncated=listing.truncated,
        )

    async def InspectLora(  # noqa: N802
        self,
        request: lora_service_pb2.InspectLoraRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.InspectLoraRequest, lora_service_pb2.InspectLoraResponse
        ],
    ) -> lora_service_pb2.InspectLoraResponse:
        """Answers what an adapter is and what it does to a model."""
        spec = self._model(request.model if request.HasField("model") else CHROMA.id)
        stop = _Stop()
        owner = current_caller().name

        def inspect(file: AdapterFile) -> AdapterInspection:
            files = self._model_files.require(spec)
            try:
                found = inspect_adapter(file, files, self._norms, check=stop.check)
            except (LoraError, LoraChanged, LoraDamaged) as error:
                raise error.at("path") from None
            self._library.learn(file, found.sha256)
            return found

        async with self._found(request.path, request.hf_token or None, owner) as file, self._inspecting:
            with stop:
                found = await asyncio.to_thread(inspect, file)
        return lora_service_pb2.InspectLoraResponse(inspection=inspection_message(request.path, spec.id, found))

    async def DeleteLora(  # noqa: N802
        self,
        request: lora_service_pb2.DeleteLoraRequest,
        context: grpc.aio.ServicerContext[lora_service_pb2.DeleteLoraRequest, lora_service_pb2.DeleteLoraResponse],
    ) -> lora_service_pb2.DeleteLoraResponse:
        """Deletes an uploaded adapter."""
        await asyncio.to_thread(self._library.delete, request.path, current_caller().name)
        return lora_service_pb2.DeleteLoraResponse()

    async def CreateLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.CreateLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.CreateLoraUploadRequest, lora_service_pb2.CreateLoraUploadResponse
        ],
    ) -> lora_service_pb2.CreateLoraUploadResponse:
        """Begins an upload, unless its bytes were uploaded before and are whole; a download may go at any time."""
        library, caller = self._library, current_caller()
        sha256 = request.sha256 if request.HasField("sha256") else None
        existing = None if sha256 is None else await self._whole_upload(sha256, caller.name)
        if existing is not None:
            return lora_service_pb2.CreateLoraUploadResponse(existing=stored_lora_message(existing))
        state = await asyncio.to_thread(
            library.uploads.create, request.filename, request.size_bytes, sha256, caller
        )
        return lora_service_pb2.CreateLoraUploadResponse(
            upload_id=state.upload_id,
            max_chunk_bytes=library.uploads.limits.max_chunk_bytes,
            expire_time=timestamp(state.expires),
        )

    async def AppendLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.AppendLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.AppendLoraUploadRequest, lora_service_pb2.AppendLoraUploadResponse
        ],
    ) -> lora_service_pb2.AppendLoraUploadResponse:
        """Takes the next bytes of an upload."""
        state = await asyncio.to_thread(
            self._library.uploads.append, request.upload_id, request.offset, request.chunk, current_caller().name
        )
        return lora_service_pb2.AppendLoraUploadResponse(
            next_offset=state.next_offset, expire_time=timestamp(state.expires)
        )

    async def FinalizeLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.FinalizeLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.FinalizeLoraUploadRequest, lora_service_pb2.FinalizeLoraUploadResponse
        ],
    ) -> lora_service_pb2.FinalizeLoraUploadResponse:
        """Ends an upload and keeps its file."""
        lora = await asyncio.to_thread(
            self._library.uploads.finalize, request.upload_id, request.sha256, current_caller().name
        )
        return lora_service_pb2.FinalizeLoraUploadResponse(lora=stored_lora_message(lora))

    async def _whole_upload(self, sha256: str, owner: str) -> StoredLora | None:
        async with self._checking:
            with _Stop() as stop:
                return await asyncio.to_thread(self._library.whole_upload, sha256, owner, stop.check)

    @contextlib.asynccontextmanager
    async def _found(self, path: str, hf_token: str | None, owner: str) -> AsyncIterator[AdapterFile]:
        """The adapter's file, which stays where it is while the context lasts.

        Raises:
            LoraError, InvalidParameter: blaming `path`; see `AdapterSources`.
        """
        asked = [PlannedLora(path, 1.0)]
        try:
            found = await self._sources.find(asked, owner)
            if None in found.files:
                async with self._fetching:
                    found = await self._sources.fetch(
                        asked, found, token=hf_token, emit=lambda _: None, owner=owner
                    )
        except ChromaError as error:
            raise type(error)(
                error.message, field="path", metadata=error.metadata, retry_after_s=error.retry_after_s
            ) from None
        try:
            yield found.complete[0]
        finally:
            found.release()

    def _model(self, model_id: str) -> ModelSpec:
        models = self._serving.models
        if model_id not in models:
            raise model_not_found(model_id, models)
        return models[self._serving.aliases.get(model_id, model_id)]


class _Stop:
    """Stops a thread's work once the context that waits for it ends."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def check(self) -> None:
        """Called by the thread.

        Raises:
            JobCancelled: nobody waits any more.
        """
        if self._is_over.is_set():
            raise JobCancelled("the caller cancelled or went away")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()


def _position(lora: StoredLora) -> tuple[int, str]:
    """Where an adapter is in the list."""
    return (_ORDER.index(lora.source), lora.path)


def _token_position(token: str) -> tuple[int, str]:
    found = token_place(token)
    if found is None:
        raise InvalidParameter("is not a token of this server", field="page_token")
    return found
