"""Reads a stored image."""

from __future__ import annotations

import grpc

from chromarpc._async.calls import AsyncCalls
from chromarpc.jobs import ImageCollector
from chromarpc.v1 import job_service_pb2


async def read_image(
    calls: AsyncCalls, request: job_service_pb2.GetImageRequest, timeout_s: float | None
) -> bytes:
    """What `AsyncClient.get_image_bytes` documents."""
    call = calls.stream(calls.jobs().GetImage, request, timeout_s)
    collected = ImageCollector()
    try:
        async for response in call:
            collected.take(response)
    except grpc.RpcError as error:
        raise calls.translated(error) from None
    finally:
        call.cancel()
    return collected.finish()[1]
