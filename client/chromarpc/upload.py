"""One upload, step by step: what to ask the server next, and what to do about its answer.

Knows no call and no channel: the sync and the async client carry out the same steps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message

from chromarpc.errors import (
    DeadlineExceeded,
    ProtocolError,
    QuotaExceeded,
    ServerUnavailable,
    StatusError,
    UploadOutOfOrder,
)
from chromarpc.loras import StoredLora, stored_lora
from chromarpc.v1 import lora_service_pb2

UploadProgress: TypeAlias = Callable[[int, int], object]
"""Called with the bytes that the server has, and the bytes of the file."""

RETRY_DELAYS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits before the tries that follow a failure; a step forward starts over."""
CALLS_QUOTA: Final = "max_calls_per_minute"
"""The quota that waiting helps against; others stay used up."""
CHUNK_BYTES: Final = 1024**2
"""As much as is sent at once, where the server takes as much."""
CALL_TIMEOUT_S: Final = 60.0
FINAL_TIMEOUT_S: Final = 600.0
"""The server brings the whole file to its disk before it answers."""


@dataclass(frozen=True)
class Call:
    """Ask the server; send the answer, or throw the error."""

    method: str
    """Of `LoraService`."""
    request: Message
    timeout_s: float
    """Deadline where nobody says."""


@dataclass(frozen=True)
class Wait:
    """Do nothing for a while."""

    delay_s: float


@dataclass(frozen=True)
class Uploaded:
    """The last step: the upload is done."""

    lora: StoredLora


Steps: TypeAlias = Generator[Call | Wait, Any, StoredLora]


def open_file(file: str | os.PathLike[str] | BufferedReader) -> AbstractContextManager[BufferedReader]:
    """A file to upload, open for reading; one that is open already stays open.

    Raises:
        OSError: it cannot be read.
    """
    return nullcontext(file) if isinstance(file, BufferedReader) else Path(file).open("rb")


def upload_steps(file: BufferedReader, filename: str, progress: UploadProgress | None) -> Steps:
    """The steps of an upload, in order.

    Args:
        file: open for reading, of a size that does not change meanwhile.
        filename: what the server shall call it.
        progress: told of every step forward.

    Raises:
        StatusError: what the server refuses, and what goes wrong more often than `RETRY_DELAYS_S` allows.
        ProtocolError: the server's answers make no sense.
        OSError: the file cannot be read, or has changed.
    """
    tell = progress or _tell_nobody
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    created: lora_service_pb2.CreateLoraUploadResponse = yield Call(
        "CreateLoraUpload",
        lora_service_pb2.CreateLoraUploadRequest(filename=filename, size_bytes=size, sha256=sha256),
        CALL_TIMEOUT_S,
    )
    if created.HasField("existing"):
        tell(size, size)
        return stored_lora(created.existing)
    if not created.upload_id or not created.max_chunk_bytes:
        raise ProtocolError("the server began an upload without saying how to go on")
    yield from _send(file, size, created, tell)
    final: lora_service_pb2.FinalizeLoraUploadResponse = yield from _insist(
        Call(
            "FinalizeLoraUpload",
            lora_service_pb2.FinalizeLoraUploadRequest(upload_id=created.upload_id, sha256=sha256),
            FINAL_TIMEOUT_S,
        )
    )
    return stored_lora(final.lora)


def advance(steps: Steps, answer: object) -> Call | Wait | Uploaded:
    """The next step after an answer, an error or nothing: the same from any thread."""
    try:
        return steps.throw(answer) if isinstance(answer, StatusError) else steps.send(answer)
    except StopIteration as end:
        return Uploaded(end.value)


def _send(
    file: BufferedReader, size: int, created: lora_service_pb2.CreateLoraUploadResponse, tell: UploadProgress
) -> Generator[Call | Wait, Any, None]:
    chunk_bytes = min(CHUNK_BYTES, created.max_chunk_bytes)
    offset = 0
    setbacks = 0
    while offset < size:
        tell(offset, size)
        file.seek(offset)
        chunk = file.read(min(chunk_bytes, size - offset))
        if not chunk:
            raise OSError("the file became shorter while it was sent")
        request = lora_service_pb2.AppendLoraUploadRequest(upload_id=created.upload_id, offset=offset, chunk=chunk)
        try:
            answer = yield from _insist(Call("AppendLoraUpload", request, CALL_TIMEOUT_S))
        except UploadOutOfOrder as error:
            # The server has another part of the file than we think: go on from there.
            setbacks += 1
            expected = error.metadata.get("expected_offset", "")
            if setbacks > len(RETRY_DELAYS_S) or not expected.isdecimal() or int(expected) > size:
                raise
            offset = int(expected)
            continue
        if not offset < answer.next_offset <= size:
            raise ProtocolError(f"after byte {offset} the server wants byte {answer.next_offset} of {size}")
        offset = answer.next_offset
        setbacks = 0
    tell(size, size)


def _insist(call: Call) -> Generator[Call | Wait, Any, Any]:
    """Repeats a call that may be repeated while the server cannot be reached, or takes no more calls a minute."""
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return (yield call)
        except (ServerUnavailable, DeadlineExceeded, QuotaExceeded) as error:
            is_other_quota = isinstance(error, QuotaExceeded) and error.metadata.get("quota") != CALLS_QUOTA
            if delay_s is None or is_other_quota:
                raise
            wait = Wait(delay_s if error.retry_after_s is None else max(delay_s, error.retry_after_s))
        yield wait
    raise AssertionError("unreachable")


def _tell_nobody(_sent_bytes: int, _total_bytes: int) -> None:
    """Progress that nobody waits for."""
