"""Images by the hash of their bytes: files in a folder, or in memory."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from chromarpc_server.durable import sync_file, sync_folder

LOST_AND_FOUND: Final = "lost+found"
"""Folder of files that no job names, below that of images."""
OWNER_ATTRIBUTE: Final = "user.chromarpc.owner"
"""Extended attribute of an image's file: names of the callers it was drawn for, one a line."""
BLOCK_BYTES: Final = 128 * 1024
"""Checked, and read, at once."""
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class DamagedImage(Exception):
    """An image's file is not there, cannot be read, or holds other bytes than its name says."""


@dataclass(frozen=True)
class CheckedImage:
    """An image whose bytes were found to have its hash, and the hash of each block of them.

    A block is checked again as it is read, so that no byte is handed out that was not.
    """

    sha256: str
    size_bytes: int
    block_hashes: tuple[bytes, ...]


class Images(Protocol):
    """Bytes by their SHA-256. Hashes are the server's own, never a client's text."""

    def put(self, sha256: str, data: bytes, owner: str) -> None:
        """Keeps the bytes; where it has them, makes sure that they are good.

        Raises:
            OSError: it cannot.
        """

    def check(self, sha256: str) -> CheckedImage:
        """Reads all of an image.

        Raises:
            DamagedImage: it is not there, or not good.
        """

    def read(self, image: CheckedImage, offset: int, size: int) -> bytes:
        """A part of an image that was checked.

        Raises:
            DamagedImage: it is not there, or not good any more.
        """

    def drop(self, hashes: list[str]) -> list[str]:
        """Forgets images for good. Returns those that could not be removed."""

    def hashes(self) -> Iterator[str]:
        """All that are kept."""

    def set_aside(self, sha256: str) -> None:
        """Moves one that no job names where no start and no sweep removes it."""

    def put_back(self, sha256: str) -> bool:
        """Moves one back that was set aside and is good. Returns whether there was one."""

    def lost(self) -> tuple[int, int]:
        """How many are set aside, and their bytes."""


class ImageFolder:
    """Files named `ab/<hash>`, written whole or not at all, readable by the server's user only."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot.
        """
        self._folder = folder
        self._lost = folder / LOST_AND_FOUND
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder.parent)

    def put(self, sha256: str, data: bytes, owner: str) -> None:
        """See `Images`."""
        path = self._path(sha256)
        if _holds(path, data):
            note_owner(path, owner)
            # Its writer may have failed between the name and the sync.
            sync_file(path)
            sync_folder(path.parent)
            return
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._folder)
        part = path.parent / f"{secrets.token_hex(8)}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                # One that is damaged may be others' too.
                for name in (owners_noted(path) or frozenset()) | {owner}:
                    note_owner(part, name)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def check(self, sha256: str) -> CheckedImage:
        """See `Images`."""
        digest, blocks, size = hashlib.sha256(), [], 0
        try:
            with self._path(sha256).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    blocks.append(hashlib.sha256(block).digest())
                    size += len(block)
        except FileNotFoundError:
            raise DamagedImage("its file is gone") from None
        except OSError as error:
            raise DamagedImage(f"its file cannot be read: {error.strerror}") from None
        if digest.hexdigest() != sha256:
            raise DamagedImage("its file holds other bytes")
        return CheckedImage(sha256, size, tuple(blocks))

    def read(self, image: CheckedImage, offset: int, size: int) -> bytes:
        """See `Images`."""
        first, last = offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)
        try:
            with self._path(image.sha256).open("rb") as file:
                file.seek(first * BLOCK_BYTES)
                data = file.read((last - first) * BLOCK_BYTES)
        except FileNotFoundError:
            raise DamagedImage("its file is gone") from None
        except OSError as error:
            raise DamagedImage(f"its file cannot be read: {error.strerror}") from None
        for index in range(first, last):
            at = (index - first) * BLOCK_BYTES
            if hashlib.sha256(data[at : at + BLOCK_BYTES]).digest() != image.block_hashes[index]:
                raise DamagedImage("its file holds other bytes")
        start = offset - first * BLOCK_BYTES
        return data[start : start + size]

    def drop(self, hashes: list[str]) -> list[str]:
        """See `Images`."""
        folders: dict[Path, list[str]] = {}
        left = []
        for sha256 in hashes:
            path = self._path(sha256)
            try:
                path.unlink(missing_ok=True)
            except OSError:
                left.append(sha256)
            else:
                folders.setdefault(path.parent, []).append(sha256)
        for folder, gone in folders.items():
            try:
                sync_folder(folder)
            except OSError:
                left += gone  # it may come back in a power failure
        return left

    def hashes(self) -> Iterator[str]:
        """See `Images`. Removes what interrupted writes left."""
        for path in sorted(self._folder.glob("[0-9a-f][0-9a-f]/*")):
            if path.suffix == ".part":
                with suppress(OSError):
                    path.unlink()
            elif _HASH.fullmatch(path.name):
                yield path.name

    def set_aside(self, sha256: str) -> None:
        """See `Images`."""
        if not self._lost.exists():
            self._lost.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._folder)
        path, lost = self._path(sha256), self._lost / sha256
        if lost.exists() and not _is_good(path, sha256):
            # The one that is there may be good, and is what its name says.
            lost = lost.with_name(f"{sha256}.damaged-{secrets.token_hex(4)}")
        path.replace(lost)
        sync_folder(self._lost)
        sync_folder(path.parent)

    def put_back(self, sha256: str) -> bool:
        """See `Images`."""
        lost, path = self._lost / sha256, self._path(sha256)
        try:
            if path.exists() or not _is_good(lost, sha256):
                return False
            path.parent.mkdir(mode=0o700, exist_ok=True)
            lost.replace(path)
            sync_folder(path.parent)
            sync_folder(self._folder)
        except OSError:
            return False
        return True

    def lost(self) -> tuple[int, int]:
        """See `Images`."""
        sizes = []
        with suppress(OSError), os.scandir(self._lost) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.is_file()]
        return len(sizes), sum(sizes)

    def _path(self, sha256: str) -> Path:
        if not _HASH.fullmatch(sha256):
            raise ValueError("not a SHA-256 in hexadecimal")
        return self._folder / sha256[:2] / sha256


class ImageMemory:
    """The same in memory, where nothing is damaged and nothing set aside."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def put(self, sha256: str, data: bytes, owner: str) -> None:  # noqa: ARG002 - nobody else can find it there
        """See `Images`."""
        self._held[sha256] = data

    def check(self, sha256: str) -> CheckedImage:
        """See `Images`."""
        data = self._held.get(sha256)
        if data is None:
            raise DamagedImage("it is gone")
        return CheckedImage(sha256, len(data), ())

    def read(self, image: CheckedImage, offset: int, size: int) -> bytes:
        """See `Images`."""
        data = self._held.get(image.sha256)
        if data is None:
            raise DamagedImage("it is gone")
        return data[offset : offset + size]

    def drop(self, hashes: list[str]) -> list[str]:
        """See `Images`."""
        for sha256 in hashes:
            self._held.pop(sha256, None)
        return []

    def hashes(self) -> Iterator[str]:
        """See `Images`."""
        yield from list(self._held)

    def set_aside(self, sha256: str) -> None:
        """See `Images`."""
        self._held.pop(sha256, None)

    def put_back(self, sha256: str) -> bool:  # noqa: ARG002 - as above
        """See `Images`."""
        return False

    def lost(self) -> tuple[int, int]:
        """See `Images`."""
        return 0, 0


def owners_noted(path: Path) -> frozenset[str] | None:
    """Whom a file was drawn for; None where nothing says so."""
    try:
        return frozenset(os.getxattr(path, OWNER_ATTRIBUTE).decode().split("\n"))
    except (OSError, AttributeError, UnicodeDecodeError):
        return None


def note_owner(path: Path, owner: str) -> None:
    """Notes one more caller that a file is for, where the file system keeps such notes."""
    known = owners_noted(path)
    if known is not None and owner in known:
        return
    with suppress(OSError, AttributeError):
        os.setxattr(path, OWNER_ATTRIBUTE, "\n".join(sorted((known or frozenset()) | {owner})).encode())


def _is_good(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False
