"""One unfinished upload: a file that grows chunk by chunk until it is as long as was announced."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from chromarpc_server.adapters.content_store import room_on_disk
from chromarpc_server.domain.errors import InvalidParameter, LoraInvalid, UploadOutOfOrder
from chromarpc_server.pipeline.adapters import require_adapter_file


@dataclass
class UnfinishedUpload:
    """What is known of an unfinished upload; hold `lock` to read or change any of it."""

    path: Path
    """The file with what was received so far."""
    owner: str
    filename: str
    """Printable, for people only."""
    size_bytes: int
    """Of the whole file, as announced."""
    announced_sha256: str | None
    expires_at: float
    """On the clock that uploads expire by, in seconds."""
    received_bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256, repr=False)
    """Of what was received."""
    is_dropped: bool = False
    """Whether its end was reached, or its time is up."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def create_file(self) -> None:
        """Makes the empty file, for this user alone.

        Raises:
            DiskFull: the disk is full.
        """
        with room_on_disk("this upload"):
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def append(self, offset: int, chunk: bytes) -> None:
        """Takes the next bytes, or accepts some that it has already.

        Args:
            offset: of the chunk's first byte in the whole file.
            chunk: one byte or more.

        Raises:
            InvalidParameter: the chunk ends beyond the announced size.
            UploadOutOfOrder: the bytes neither go on where the upload is nor repeat what it has.
            DiskFull: the disk is full.
        """
        end = offset + len(chunk)
        if end > self.size_bytes:
            raise InvalidParameter(f"ends at byte {end} of an upload of {self.size_bytes} bytes", field="chunk")
        if offset == self.received_bytes:
            with room_on_disk("this upload"), self.path.open("r+b") as part:
                part.seek(offset)
                part.write(chunk)
            self.digest.update(chunk)
            self.received_bytes = end
        elif end > self.received_bytes or self._read(offset, len(chunk)) != chunk:
            raise self._out_of_order("these bytes do not go on where the upload is")

    def require_all_bytes(self) -> None:
        """Checks that nothing is missing.

        Raises:
            UploadOutOfOrder: some bytes are.
        """
        if self.received_bytes != self.size_bytes:
            raise self._out_of_order("bytes are missing")

    def require_adapter(self, sha256: str) -> None:
        """Checks what was received: its hash, and that it can be an adapter.

        Args:
            sha256: the hash that the sender expects; one that it announced at the beginning must be the same.

        Raises:
            LoraInvalid: another hash, or not an adapter file.
        """
        received = self.digest.hexdigest()
        if {received} != {sha256, self.announced_sha256 or received}:
            raise LoraInvalid(f"the bytes received have another hash: {received}", field="sha256")
        require_adapter_file(self.path)

    def sync(self) -> None:
        """Makes the file's content outlast a power failure.

        Raises:
            OSError: the disk does not take it.
        """
        with self.path.open("rb") as part:
            os.fsync(part.fileno())

    def drop(self) -> None:
        """Ends the upload and deletes its file, unless that was moved away."""
        self.is_dropped = True
        self.path.unlink(missing_ok=True)

    def _read(self, offset: int, count: int) -> bytes:
        with self.path.open("rb") as part:
            part.seek(offset)
            return part.read(count)

    def _out_of_order(self, problem: str) -> UploadOutOfOrder:
        return UploadOutOfOrder(
            f"{problem}: send what begins at byte {self.received_bytes}",
            field="offset",
            metadata={"expected_offset": str(self.received_bytes)},
        )
