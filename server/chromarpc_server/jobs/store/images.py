"""Images by the hash of their bytes: files in a folder, or in memory."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_HASH = re.compile(r"[0-9a-f]{64}")


class Images(Protocol):
    """Bytes by their SHA-256. Hashes are the server's own, never a client's text."""

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps the bytes; does nothing where it has them.

        Raises:
            OSError: it cannot.
        """

    def read(self, sha256: str, offset: int, size: int) -> bytes:
        """A part of them.

        Raises:
            OSError: they are not kept.
        """

    def drop(self, sha256: str) -> None:
        """Forgets them."""

    def hashes(self) -> Iterator[str]:
        """All that are kept."""


class ImageFolder:
    """Files named `ab/<hash>`, written whole or not at all, readable by the server's user only."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot.
        """
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, sha256: str, data: bytes) -> None:
        """See `Images`."""
        path = self._path(sha256)
        if path.exists():
            return
        fresh = not path.parent.exists()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part = path.parent / f"{secrets.token_hex(8)}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        if fresh:
            _sync_folder(self._folder)

    def read(self, sha256: str, offset: int, size: int) -> bytes:
        """See `Images`."""
        with self._path(sha256).open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"the image {sha256} is cut short")
        return data

    def drop(self, sha256: str) -> None:
        """See `Images`."""
        with suppress(OSError):
            self._path(sha256).unlink(missing_ok=True)

    def hashes(self) -> Iterator[str]:
        """See `Images`. Removes what interrupted writes left."""
        for path in list(self._folder.glob("*/*")):
            if path.suffix == ".part":
                with suppress(OSError):
                    path.unlink()
            elif _HASH.fullmatch(path.name):
                yield path.name

    def _path(self, sha256: str) -> Path:
        if not _HASH.fullmatch(sha256):
            raise ValueError("not a SHA-256 in hexadecimal")
        return self._folder / sha256[:2] / sha256


class ImageMemory:
    """The same in memory."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def put(self, sha256: str, data: bytes) -> None:
        """See `Images`."""
        self._held[sha256] = data

    def read(self, sha256: str, offset: int, size: int) -> bytes:
        """See `Images`."""
        data = self._held.get(sha256)
        if data is None:
            raise FileNotFoundError(sha256)
        return data[offset : offset + size]

    def drop(self, sha256: str) -> None:
        """See `Images`."""
        self._held.pop(sha256, None)

    def hashes(self) -> Iterator[str]:
        """See `Images`."""
        yield from list(self._held)


def _sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
