"""Hashes of the adapter root's files, so that `sha256:…` names them too.

The root is not hashed at the start, which could take hours. Files are hashed while a caller waits for a hash that
is not known: each version of a file once, in slices of `SLICE_S`, one slice at a time for all callers. When no
caller waits any more, hashing stops after the slice; a file that was hashed in part is continued for the next
caller. Only files whose header and size can be an adapter's are read.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BufferedReader

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import LoraChanged, LoraInvalid
from chromarpc_server.pipeline.adapters import require_adapter_file

WAIT_S = 10.0
"""Seconds that one call waits for files to be hashed, which also bounds how much is read for it."""
SLICE_S = 0.2
"""Seconds of hashing, after which it is checked whether a caller still waits."""
_READ_BYTES = 4 * 1024 * 1024

Files = Callable[[], Sequence[AdapterFile]]
"""Lists the root: every file that requests can name."""


class StillHashing(Exception):
    """Whether there is such a file is not known yet; asking again later helps."""


@dataclass
class _PartialHash:
    """A file that was hashed in part."""

    file: AdapterFile
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    done_bytes: int = 0

    def advance(self, stream: BufferedReader, until: float) -> bool:
        """Hashes one piece or more until `time.monotonic()` reaches `until`; whether nothing is left to read."""
        stream.seek(self.done_bytes)
        while piece := stream.read(min(_READ_BYTES, self.file.size_bytes - self.done_bytes)):
            self.digest.update(piece)
            self.done_bytes += len(piece)
            if time.monotonic() >= until:
                return self.done_bytes == self.file.size_bytes
        return True


class RootHashes:
    """Hashes by file version. `find` belongs to one event loop; the rest may be called from any thread."""

    def __init__(self, files: Files) -> None:
        """`files` is called with each `find`, on a thread."""
        self._files = files
        self._known: dict[AdapterFile, str] = {}
        """Empty for what is no adapter, or changed before it was read to its end."""
        self._unreadable: set[AdapterFile] = set()
        """Tried again for the next `find`."""
        self._begun: _PartialHash | None = None
        """Belongs to the slice."""
        self._slice: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        """Held while what is known is replaced."""
        self._is_closed = False

    def of(self, file: AdapterFile) -> str:
        """The file's hash, hexadecimal; empty where it is not known."""
        return self._known.get(file, "")

    def learn(self, file: AdapterFile, sha256: str) -> None:
        """Notes the hash of a file that was read for another purpose."""
        with self._lock:
            self._known[file] = sha256

    def close(self) -> None:
        """Ends every wait."""
        self._is_closed = True

    async def find(self, sha256: str, *, wait_s: float = WAIT_S) -> AdapterFile | None:
        """The file with this hash; None where there is none.

        Args:
            sha256: the hash.
            wait_s: seconds; 0 hashes nothing, and anything more at least one slice.

        Raises:
            StillHashing: not all files were hashed in time.
        """
        deadline = time.monotonic() + wait_s
        found, left = await asyncio.to_thread(self._survey, sha256)
        is_late = wait_s <= 0
        while found is None and left:
            if self._is_closed or is_late:
                raise StillHashing
            if self._slice is None or self._slice.done():
                self._slice = asyncio.create_task(asyncio.to_thread(self._hash, tuple(left)))
                self._slice.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            # Not awaited itself: others may wait for it too, and it ends soon.
            hashing = self._slice
            await asyncio.wait({hashing})
            hashing.result()
            while found is None and left and (left[-1] in self._known or left[-1] in self._unreadable):
                file = left.pop()
                found = file if self._known.get(file) == sha256 else None
            is_late = time.monotonic() >= deadline
        return found

    def _survey(self, sha256: str) -> tuple[AdapterFile | None, list[AdapterFile]]:
        """The file with this hash, or those that are not hashed yet, the first of them last."""
        files = self._files()
        with self._lock:
            self._known = {file: self._known[file] for file in files if file in self._known}
            self._unreadable = set()
        found = next((file for file in files if self._known.get(file) == sha256), None)
        return found, [file for file in reversed(files) if file not in self._known]

    def _hash(self, files: Sequence[AdapterFile]) -> None:
        """Hashes for one slice, the last file first."""
        until = time.monotonic() + SLICE_S
        for file in reversed(files):
            if file not in self._known and not self._hash_one(file, until):
                return

    def _hash_one(self, file: AdapterFile, until: float) -> bool:
        """Hashes a file, or the rest of it; whether its end was reached."""
        begun, self._begun = self._begun, None
        try:
            with file.open() as stream:
                if begun is None or begun.file != file:
                    require_adapter_file(file.path, file.open)
                    begun = _PartialHash(file)
                if not begun.advance(stream, until):
                    self._begun = begun
                    return False
                is_whole = begun.done_bytes == file.size_bytes and file.is_same(os.fstat(stream.fileno()))
                self.learn(file, begun.digest.hexdigest() if is_whole else "")
        except (LoraInvalid, LoraChanged):
            self.learn(file, "")
        except OSError:
            self._unreadable.add(file)
        return True
