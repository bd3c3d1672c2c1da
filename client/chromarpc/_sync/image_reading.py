# Generated from client/chromarpc/_async/image_reading.py by tools/unasync.py: do not edit.
"""Reads a stored image."""

from __future__ import annotations

import grpc

from chromarpc._sync.calls import Calls
from chromarpc.jobs import ImageCollector
from chromarpc.v1 import job_service_pb2


def read_image(calls: Calls, request: job_service_pb2.GetImageRequest, timeout_s: float | None) -> bytes:
    """What `Client.get_image_bytes` documents."""
    call = calls.stream(calls.jobs().GetImage, request, timeout_s)
    collected = ImageCollector()
    try:
        for response in call:
            collected.take(response)
    except grpc.RpcError as error:
        raise calls.translated(error) from None
    finally:
        call.cancel()
    return collected.finish()[1]
