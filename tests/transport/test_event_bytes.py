"""Events become bytes once, and what is put together by hand is what protobuf makes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from chromarpc.v1 import job_service_pb2
from chromarpc_server.domain.events import ImageChunk
from chromarpc_server.jobs.encoding import CHUNK_BYTES
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.transport.messages.events import encoded_event, job_event


@pytest.mark.parametrize("size_bytes", [1, 100, 127, 128, 16_000, 16_383, 16_384, CHUNK_BYTES])
@pytest.mark.parametrize(("prompt_index", "offset_bytes"), [(0, 0), (3, 2**31), (200, 5)])
def test_a_chunks_bytes_are_those_that_protobuf_makes(
    size_bytes: int, prompt_index: int, offset_bytes: int
) -> None:
    chunk = ImageChunk(prompt_index, offset_bytes, bytes(index % 251 for index in range(size_bytes)))
    logged = LoggedEvent(3_000_007, datetime(2026, 5, 4, 3, 2, 1, 987654, UTC), chunk)
    whole = job_service_pb2.WatchJobResponse(event=job_event(logged))
    assert encoded_event(logged) == whole.SerializeToString()
