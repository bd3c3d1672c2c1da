"""Hashes of the adapter root's files, so that `sha256:…` names them too.

Nobody is made to read the whole root at a start: the first hash that is asked for and not known has every file
hashed, once for each version of it, by one thread, whoever waits for that.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence

from chromarpc_server.engine.adapter_cache import AdapterFile

WAIT_S = 10.0
"""How long one call waits for files to be hashed."""
_READ_BYTES = 4 * 1024 * 1024

Files = Callable[[], Sequence[AdapterFile]]
"""Looks at the root: every file that requests can name."""


class StillHashing(Exception):
    """Whether there is such a file is not known yet; asking again later helps."""


class RootHashes:
    """Safe to call from any thread."""

    def __init__(self, files: Files) -> None:
        """`files` is called with each `find`."""
        self._files = files
        self._known: dict[AdapterFile, str] = {}
        """Empty for a file that cannot be read."""
        self._changed = threading.Condition()
        self._is_hashing = False

    def of(self, file: AdapterFile) -> str:
        """The file's hash, hexadecimal; empty where it is not known."""
        return self._known.get(file, "")

    def learn(self, file: AdapterFile, sha256: str) -> None:
        """Takes the hash of a file that somebody has read anyway."""
        with self._changed:
            self._known[file] = sha256
            self._changed.notify_all()

    def find(self, sha256: str, *, wait_s: float = WAIT_S) -> AdapterFile | None:
        """The file with this hash; None where there is none.

        Raises:
            StillHashing: not all files were hashed in time.
        """
        deadline = time.monotonic() + wait_s
        files = self._files()
        with self._changed:
            while True:
                found = next((file for file in files if self._known.get(file) == sha256), None)
                if found is not None or all(file in self._known for file in files):
                    return found
                if not self._is_hashing:
                    self._is_hashing = True
                    threading.Thread(target=self._hash, args=(files,), name="root-hashes", daemon=True).start()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise StillHashing
                self._changed.wait(left_s)

    def _hash(self, files: Sequence[AdapterFile]) -> None:
        try:
            with self._changed:
                self._known = {file: self._known[file] for file in files if file in self._known}
            for file in files:
                if file not in self._known:
                    self.learn(file, _sha256(file))
        finally:
            with self._changed:
                self._is_hashing = False
                self._changed.notify_all()


def _sha256(file: AdapterFile) -> str:
    """Hash of the file as it was looked at; empty where it cannot be read, or is another one by now."""
    try:
        # Without waiting, if it became a pipe meanwhile.
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    digest = hashlib.sha256()
    left = file.size_bytes
    try:
        with os.fdopen(descriptor, "rb") as stream:
            if not file.is_same(os.fstat(descriptor)):
                return ""
            while left > 0 and (piece := stream.read(min(_READ_BYTES, left))):
                digest.update(piece)
                left -= len(piece)
            return digest.hexdigest() if file.is_same(os.fstat(descriptor)) else ""
    except OSError:
        return ""
