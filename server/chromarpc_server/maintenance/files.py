"""Files of the data folder: hashed, copied whole or not at all, moved and never overwritten; whose they are."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from chromarpc_server.durable import make_folder, sync_folder
from chromarpc_server.jobs.store.images import OWNER_ATTRIBUTE

_BLOCK_BYTES = 1024**2
_NO_FILE = "it is no plain file"
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Damaged(Exception):
    """A file's bytes are not those that its name promises; the message says how."""


@dataclass(frozen=True)
class ListedFile:
    """A file that nothing names."""

    name: str
    size_bytes: int
    owners: tuple[str, ...] | None = None
    """Callers' names; None where they are not known."""

    def __str__(self) -> str:
        owners = "its owner is not known" if self.owners is None else f"of {', '.join(map(repr, self.owners))}"
        return f"{self.name}: {self.size_bytes} bytes, {owners}"


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: Path) -> BufferedReader:
    """Opens a file to read it. A link, a pipe or a device is none, and is not waited for.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    try:
        file = os.fdopen(os.open(path, _OPEN), "rb")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, _NO_FILE, str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, _NO_FILE, str(path))
    return file


def damage_of(path: Path, sha256: str) -> str | None:
    """Why a file is not what its name promises; None where it is."""
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"
    return None if found == sha256 else "its bytes have another SHA-256"


def copy_whole(source: Path, target: Path, sha256: str | None = None) -> str:
    """Copies a file with its times and its extended attributes; the copy is synced, and its owner's alone.

    Args:
        source: is read once.
        target: must not exist; the folder must.
        sha256: of the bytes; None takes them as they are.

    Returns:
        The SHA-256 of what was copied.

    Raises:
        Damaged: the bytes have another hash, or cannot be read, or it is no plain file; there is no target then.
        FileNotFoundError: there is no source.
        OSError: the target cannot be written.
    """
    digest = hashlib.sha256()
    part = target.with_name(f"{secrets.token_hex(8)}.part")
    try:
        with _opened(source) as reading:
            status = os.fstat(reading.fileno())
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as writing:
                while block := _read(reading.fileno()):
                    digest.update(block)
                    writing.write(block)
                writing.flush()
                os.utime(writing.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
                os.fsync(writing.fileno())
        if sha256 is not None and digest.hexdigest() != sha256:
            raise Damaged("its bytes have another SHA-256")
        _copy_attributes(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


def _opened(source: Path) -> BufferedReader:
    try:
        return open_plain(source)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Damaged(_NO_FILE) from None


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _BLOCK_BYTES)
    except OSError as error:
        raise Damaged(f"the file cannot be read ({error.strerror})") from None


def _copy_attributes(source: Path, target: Path) -> None:
    if hasattr(os, "listxattr"):
        with suppress(OSError):  # a file system without them, on either side
            for name in os.listxattr(source):
                if name.startswith("user."):
                    os.setxattr(target, name, os.getxattr(source, name))


def set_owners(path: Path, owners: frozenset[str]) -> None:
    """Notes the callers anew; without any, nothing says whose the file is.

    Raises:
        OSError: the file system does not take it.
    """
    if not owners:  # an empty note would name the one caller of a server without a callers file
        os.removexattr(path, OWNER_ATTRIBUTE)
        return
    os.setxattr(path, OWNER_ATTRIBUTE, "\n".join(sorted(owners)).encode())


def move_aside(path: Path, folder: Path) -> Path:
    """Moves a file or a folder into another folder, which is made; what is there is never overwritten.

    Returns:
        Where it lies now.

    Raises:
        OSError: it cannot be moved.
    """
    make_folder(folder)
    target, number = folder / path.name, 0
    while target.exists() or target.is_symlink():
        number += 1
        stem, dot, suffix = path.name.partition(".")
        target = folder / f"{stem}-{number}{dot}{suffix}"
    path.rename(target)
    sync_folder(folder)
    sync_folder(path.parent)
    return target


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted; links are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(root, name)


def sync_tree(folder: Path) -> None:
    """Makes the names in a folder, and in all below it, outlast a power failure."""
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(root))
