"""Jobs that outlive a connection: how often to come back to one, and the image that a server sends again."""

from __future__ import annotations

import hashlib
from typing import Final

from chromarpc.errors import ProtocolError
from chromarpc.v1 import generation_service_pb2, job_event_pb2, job_service_pb2

FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 5.0
MOST_TRIES: Final = 20
"""In a row without an event in between: about 80 s."""
PAGE_SIZE: Final = 1000
JobMessage = generation_service_pb2.GenerateResponse | job_service_pb2.WatchJobResponse


def wait_s(tries: int) -> float:
    """Seconds before the next try to come back, after so many that failed."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**tries)


class ImageCollector:
    """Takes the messages of `GetImage` one by one."""

    def __init__(self) -> None:
        self._header: job_event_pb2.ImageHeader | None = None
        self._data = bytearray()

    def take(self, response: job_service_pb2.GetImageResponse) -> None:
        """The next message.

        Raises:
            ProtocolError: it cannot come here.
        """
        if response.WhichOneof("part") == "image_header":
            if self._header is not None:
                raise ProtocolError("a second image began")
            self._header = response.image_header
            return
        if self._header is None or response.image_chunk.offset_bytes != len(self._data):
            raise ProtocolError("a part of an image came out of order")
        self._data += response.image_chunk.data

    def finish(self) -> tuple[job_event_pb2.ImageHeader, bytes]:
        """The header and the bytes.

        Raises:
            ProtocolError: bytes are missing, or are others than announced.
        """
        data = bytes(self._data)
        header = self._header
        if header is None or len(data) != header.size_bytes:
            raise ProtocolError("the image ended early")
        if hashlib.sha256(data).hexdigest() != header.sha256:
            raise ProtocolError("the image's bytes are not those that were announced")
        return header, data
