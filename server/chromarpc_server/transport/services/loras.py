"""`LoraService`: the adapters that requests can name, and uploads of more."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import itertools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import datetime
from typing import Any, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.v1 import job_event_pb2, lora_service_pb2, lora_service_pb2_grpc
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.inspection import AdapterInspection, inspect_adapter
from chromarpc_server.adapters.library import AdapterLibrary, LoraSource, StoredLora
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.adapters.weight_norms import WeightNorms
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import (
    MAX_LISTED,
    ChromaError,
    InvalidParameter,
    JobCancelled,
    LoraChanged,
    LoraError,
    ModelNotFound,
    first_named,
)
from chromarpc_server.domain.models import CHROMA, ModelSpec
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.transport.messages.errors import code_of, shorten, status_message, trailing_metadata
from chromarpc_server.transport.messages.events import MAX_METADATA_BYTES, MAX_UNMATCHED_BYTES
from chromarpc_server.transport.messages.paging import Page

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FETCHING = 4
"""Downloads at once that are for inspections; others wait. Those of jobs are bounded by the queue."""

_SOURCES = {
    LoraSource.ROOT: lora_service_pb2.LORA_SOURCE_ROOT,
    LoraSource.UPLOAD: lora_service_pb2.LORA_SOURCE_UPLOAD,
    LoraSource.DOWNLOAD: lora_service_pb2.LORA_SOURCE_DOWNLOAD,
}
_ORDER = (LoraSource.ROOT, LoraSource.UPLOAD, LoraSource.DOWNLOAD)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Servicer = TypeVar("_Servicer")


def _answering(
    method: Callable[[_Servicer, _Request, Any], Awaitable[_Response]],
) -> Callable[[_Servicer, _Request, Any], Coroutine[Any, Any, _Response]]:
    """Ends the call with the status of the error that the method raises."""

    @functools.wraps(method)
    async def answer(self: _Servicer, request: _Request, context: Any) -> _Response:
        try:
            return await method(self, request, context)
        except ChromaError as error:
            await context.abort(code_of(error), status_message(error), trailing_metadata(error))
            raise

    return answer


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
        self._norms = WeightNorms()

    @_answering
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
        told = list(itertools.takewhile(page.takes, map(_stored_lora, rest)))
        return lora_service_pb2.ListLorasResponse(
            loras=told,
            next_page_token=_token(_position(rest[len(told) - 1])) if len(rest) > len(told) else "",
            truncated=listing.truncated,
        )

    @_answering
    async def InspectLora(  # noqa: N802
        self,
        request: lora_service_pb2.InspectLoraRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.InspectLoraRequest, lora_service_pb2.InspectLoraResponse
        ],
    ) -> lora_service_pb2.InspectLoraResponse:
        """Tells what an adapter is and what it does to a model."""
        spec = self._model(request.model if request.HasField("model") else CHROMA.id)
        is_unwanted = threading.Event()
        owner = current_caller().name

        def check() -> None:
            if is_unwanted.is_set():
                raise JobCancelled("the caller cancelled or went away")

        def inspect(file: AdapterFile) -> AdapterInspection:
            files = self._model_files.require(spec)
            try:
                found = inspect_adapter(file, files, self._norms, check=check)
            except (LoraError, LoraChanged) as error:
                raise error.at("path") from None
            self._library.learn(file, found.sha256)
            return found

        async with self._found(request.path, request.hf_token or None, owner) as file, self._inspecting:
            try:
                found = await asyncio.to_thread(inspect, file)
            finally:
                is_unwanted.set()
        return lora_service_pb2.InspectLoraResponse(inspection=_inspection(request.path, spec.id, found))

    @_answering
    async def DeleteLora(  # noqa: N802
        self,
        request: lora_service_pb2.DeleteLoraRequest,
        context: grpc.aio.ServicerContext[lora_service_pb2.DeleteLoraRequest, lora_service_pb2.DeleteLoraResponse],
    ) -> lora_service_pb2.DeleteLoraResponse:
        """Deletes an uploaded adapter."""
        await asyncio.to_thread(self._library.delete, request.path, current_caller().name)
        return lora_service_pb2.DeleteLoraResponse()

    @_answering
    async def CreateLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.CreateLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.CreateLoraUploadRequest, lora_service_pb2.CreateLoraUploadResponse
        ],
    ) -> lora_service_pb2.CreateLoraUploadResponse:
        """Begins an upload, unless its bytes were uploaded before; a download may leave its cache at any time."""
        library, caller = self._library, current_caller()
        sha256 = request.sha256 if request.HasField("sha256") else None
        existing = None if sha256 is None else await asyncio.to_thread(library.find, sha256, caller.name)
        if existing is not None and existing.source is LoraSource.UPLOAD:
            return lora_service_pb2.CreateLoraUploadResponse(existing=_stored_lora(existing))
        state = await asyncio.to_thread(
            library.create_upload, request.filename, request.size_bytes, sha256, caller
        )
        return lora_service_pb2.CreateLoraUploadResponse(
            upload_id=state.upload_id,
            max_chunk_bytes=library.limits.max_chunk_bytes,
            expire_time=_timestamp(state.expires),
        )

    @_answering
    async def AppendLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.AppendLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.AppendLoraUploadRequest, lora_service_pb2.AppendLoraUploadResponse
        ],
    ) -> lora_service_pb2.AppendLoraUploadResponse:
        """Takes the next bytes of an upload."""
        state = await asyncio.to_thread(
            self._library.append, request.upload_id, request.offset, request.chunk, current_caller().name
        )
        return lora_service_pb2.AppendLoraUploadResponse(
            next_offset=state.next_offset, expire_time=_timestamp(state.expires)
        )

    @_answering
    async def FinalizeLoraUpload(  # noqa: N802
        self,
        request: lora_service_pb2.FinalizeLoraUploadRequest,
        context: grpc.aio.ServicerContext[
            lora_service_pb2.FinalizeLoraUploadRequest, lora_service_pb2.FinalizeLoraUploadResponse
        ],
    ) -> lora_service_pb2.FinalizeLoraUploadResponse:
        """Ends an upload and keeps its file."""
        lora = await asyncio.to_thread(
            self._library.finalize, request.upload_id, request.sha256, current_caller().name
        )
        return lora_service_pb2.FinalizeLoraUploadResponse(lora=_stored_lora(lora))

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
            raise type(error)(error.message, field="path", retry_after_s=error.retry_after_s) from None
        try:
            yield found.complete[0]
        finally:
            found.release()

    def _model(self, model_id: str) -> ModelSpec:
        models = self._serving.models
        if model_id not in models:
            served = sorted(models)
            raise ModelNotFound(
                f"no model has the id {model_id[:64]!r}; this server knows {first_named(served)}",
                field="model",
                metadata={"models": ",".join(served[:MAX_LISTED])},
            )
        return models[self._serving.aliases.get(model_id, model_id)]


_Position = tuple[int, str]
"""Where an adapter is in the list."""


def _position(lora: StoredLora) -> _Position:
    return (_ORDER.index(lora.source), lora.path)


def _token(position: _Position) -> str:
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def _token_position(token: str) -> _Position:
    try:
        match json.loads(base64.b64decode(token, b"-_", validate=True)):
            case [int(order), str(path)]:
                return (order, path)
    except (ValueError, RecursionError, binascii.Error):
        pass
    raise InvalidParameter("is not a token of this server", field="page_token")


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _stored_lora(lora: StoredLora) -> lora_service_pb2.StoredLora:
    return lora_service_pb2.StoredLora(
        path=lora.path,
        source=_SOURCES[lora.source],
        size_bytes=lora.size_bytes,
        sha256=lora.sha256,
        modified_time=_timestamp(lora.modified),
        filename=lora.filename,
    )


def _inspection(path: str, model: str, found: AdapterInspection) -> lora_service_pb2.LoraInspection:
    return lora_service_pb2.LoraInspection(
        path=path,
        model=model,
        sha256=found.sha256,
        size_bytes=found.size_bytes,
        format=found.format,
        dtypes=found.dtypes,
        ranks=found.ranks,
        alphas=found.alphas,
        matched_key_count=found.matched_keys,
        unmatched_key_count=len(found.unmatched_keys),
        unmatched_keys=[
            shorten(ascii(key)[1:-1], MAX_UNMATCHED_BYTES) for key in found.unmatched_keys[:MAX_LISTED]
        ],
        unsupported=[
            lora_service_pb2.UnsupportedKeys(name=name, key_count=count)
            for name, count in found.unsupported.items()
        ],
        changed_parameter_count=found.changed_parameters,
        blocks=[
            lora_service_pb2.BlockStrength(
                block=block.block,
                norm=block.norm,
                rms=block.rms,
                has_magnitude=block.has_magnitude,
                relative_norm=block.relative_norm,
            )
            for block in found.blocks
        ],
        metadata={
            shorten(key, MAX_UNMATCHED_BYTES): shorten(value, MAX_METADATA_BYTES)
            for key, value in list(found.metadata.items())[:MAX_LISTED]
        },
        warnings=[
            job_event_pb2.Warning(code=warning.code, field=warning.field, message=shorten(warning.message))
            for warning in found.warnings
        ],
    )
