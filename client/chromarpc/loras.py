"""What a server tells of its adapters, as typed values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from google.protobuf import timestamp_pb2

from chromarpc.errors import ProtocolError
from chromarpc.events import JobWarning
from chromarpc.v1 import lora_service_pb2

PAGE_SIZE: Final = 1000
"""Adapters asked for at once."""
INSPECT_TIMEOUT_S: Final = 120.0
"""Deadline of an inspection where nobody says: the server reads the whole file."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class LoraSource(StrEnum):
    """Where an adapter comes from."""

    UNKNOWN = "unknown"
    """A source that this version of the client does not know."""
    ROOT = "root"
    """A file below the server's adapter root."""
    UPLOAD = "upload"
    DOWNLOAD = "download"


_SOURCES: Final = {
    lora_service_pb2.LORA_SOURCE_ROOT: LoraSource.ROOT,
    lora_service_pb2.LORA_SOURCE_UPLOAD: LoraSource.UPLOAD,
    lora_service_pb2.LORA_SOURCE_DOWNLOAD: LoraSource.DOWNLOAD,
}


@dataclass(frozen=True, kw_only=True)
class StoredLora:
    """An adapter that the server has."""

    path: str
    """What `Lora.path` and `loras=` take: below the adapter root, or `sha256:` and the file's hash."""
    source: LoraSource
    size_bytes: int
    sha256: str
    """Of the file, hexadecimal; empty where the server does not know it yet."""
    modified_time: datetime
    """When the file was last written, in UTC."""
    filename: str
    """What whoever uploaded it called it; empty for others."""


@dataclass(frozen=True, kw_only=True)
class LoraList:
    """A server's adapters: the root's, then uploads, then downloads, each sorted by path."""

    loras: tuple[StoredLora, ...]
    truncated: bool
    """Whether the adapter root holds more than the server looks at; requests can name them still."""

    def __iter__(self) -> Iterator[StoredLora]:
        return iter(self.loras)

    def __len__(self) -> int:
        return len(self.loras)


@dataclass(frozen=True, kw_only=True)
class UnsupportedKeys:
    """Keys that the server cannot use, although it knows what they are."""

    name: str
    """What they are: `text encoder`."""
    key_count: int


@dataclass(frozen=True, kw_only=True)
class BlockStrength:
    """How strongly an adapter at multiplier 1 changes one block of the model."""

    block: str
    """`double_blocks.3`, or `img_in` of what is in no block."""
    norm: float
    """Frobenius norm of what is added to the block's weights; absolute."""
    rms: float
    """Root mean square of what is added to one value; comparable between blocks of different sizes."""
    has_magnitude: bool
    """Whether DoRA scales the changed weights on top, which is not in the numbers."""
    relative_norm: float | None
    """`norm` relative to that of the model's own parameters that are changed; None where the server tells none."""


@dataclass(frozen=True, kw_only=True)
class LoraInspection:
    """What an adapter file is and does to a model."""

    path: str
    model: str
    """Id of the model that it was compared with."""
    sha256: str
    """Of the file, hexadecimal."""
    size_bytes: int
    format: str
    """Name of the recognised format, such as `ai-toolkit LoRA`."""
    dtypes: tuple[str, ...]
    """Of the values that count, as safetensors names them: `BF16`."""
    ranks: tuple[int, ...]
    """The distinct ranks, ascending; the first 20."""
    alphas: tuple[float, ...]
    """The distinct alphas that count, ascending; the first 20. Where the file names none, its rank."""
    matched_key_count: int
    unmatched_key_count: int
    unmatched_keys: tuple[str, ...]
    """The first 20, as ASCII."""
    unsupported: tuple[UnsupportedKeys, ...]
    changed_parameter_count: int
    """Parameters of the model that it changes."""
    blocks: tuple[BlockStrength, ...]
    metadata: Mapping[str, str]
    """The file's own header (name, trainer, step), shortened."""
    warnings: tuple[JobWarning, ...]


def stored_lora(message: lora_service_pb2.StoredLora) -> StoredLora:
    """The value of a message.

    Raises:
        ProtocolError: its time cannot be.
    """
    return StoredLora(
        path=message.path,
        source=_SOURCES.get(message.source, LoraSource.UNKNOWN),
        size_bytes=message.size_bytes,
        sha256=message.sha256,
        modified_time=_time(message.modified_time),
        filename=message.filename,
    )


def lora_list(pages: Iterable[lora_service_pb2.ListLorasResponse]) -> LoraList:
    """All pages as one list.

    Raises:
        ProtocolError: a time cannot be.
    """
    pages = tuple(pages)
    return LoraList(
        loras=tuple(stored_lora(message) for page in pages for message in page.loras),
        truncated=any(page.truncated for page in pages),
    )


def list_request(
    before: lora_service_pb2.ListLorasResponse | None,
) -> lora_service_pb2.ListLorasRequest | None:
    """Asks for the page that follows another one, or for the first; None after the last."""
    if before is None:
        return lora_service_pb2.ListLorasRequest(page_size=PAGE_SIZE)
    if not before.next_page_token:
        return None
    return lora_service_pb2.ListLorasRequest(page_size=PAGE_SIZE, page_token=before.next_page_token)


def lora_inspection(message: lora_service_pb2.LoraInspection) -> LoraInspection:
    """The value of a message."""
    return LoraInspection(
        path=message.path,
        model=message.model,
        sha256=message.sha256,
        size_bytes=message.size_bytes,
        format=message.format,
        dtypes=tuple(message.dtypes),
        ranks=tuple(message.ranks),
        alphas=tuple(message.alphas),
        matched_key_count=message.matched_key_count,
        unmatched_key_count=message.unmatched_key_count,
        unmatched_keys=tuple(message.unmatched_keys),
        unsupported=tuple(
            UnsupportedKeys(name=part.name, key_count=part.key_count) for part in message.unsupported
        ),
        changed_parameter_count=message.changed_parameter_count,
        blocks=tuple(
            BlockStrength(
                block=block.block,
                norm=block.norm,
                rms=block.rms,
                has_magnitude=block.has_magnitude,
                relative_norm=block.relative_norm if block.HasField("relative_norm") else None,
            )
            for block in message.blocks
        ),
        metadata=dict(message.metadata),
        warnings=tuple(
            JobWarning(code=warning.code, field=warning.field, message=warning.message)
            for warning in message.warnings
        ),
    )


def _time(timestamp: timestamp_pb2.Timestamp) -> datetime:
    try:
        return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1000)
    except OverflowError:
        raise ProtocolError(f"an adapter is from {timestamp.seconds} s after 1970") from None
