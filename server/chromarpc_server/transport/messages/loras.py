"""Adapters as messages: those that the server has, and what is in one."""

from __future__ import annotations

from chromarpc.v1 import lora_service_pb2
from chromarpc_server.adapters.inspection import AdapterInspection
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.domain.errors import MAX_LISTED
from chromarpc_server.transport.messages.events import MAX_KEY, cut_metadata, warning_messages
from chromarpc_server.transport.messages.values import shorten, timestamp

_SOURCES = {
    LoraSource.ROOT: lora_service_pb2.LORA_SOURCE_ROOT,
    LoraSource.UPLOAD: lora_service_pb2.LORA_SOURCE_UPLOAD,
    LoraSource.DOWNLOAD: lora_service_pb2.LORA_SOURCE_DOWNLOAD,
}


def stored_lora_message(lora: StoredLora) -> lora_service_pb2.StoredLora:
    """An adapter that requests can name."""
    return lora_service_pb2.StoredLora(
        path=lora.path,
        source=_SOURCES[lora.source],
        size_bytes=lora.size_bytes,
        sha256=lora.sha256,
        modified_time=timestamp(lora.modified),
        filename=lora.filename,
    )


def inspection_message(path: str, model: str, found: AdapterInspection) -> lora_service_pb2.LoraInspection:
    """What was found in an adapter's file, by the path and for the model that were asked for."""
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
        unmatched_keys=[shorten(ascii(key)[1:-1], MAX_KEY) for key in found.unmatched_keys[:MAX_LISTED]],
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
        metadata=cut_metadata(found.metadata),
        warnings=warning_messages(found.warnings),
    )
