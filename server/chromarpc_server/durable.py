"""Folders and files that outlast a power failure once a call has returned."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""What file systems say that sync no folders, and need not."""
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_out_of_space(error: OSError) -> bool:
    """Whether a file could not be written because the disk, a quota or the file system has no room for it."""
    return error.errno in _OUT_OF_SPACE


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power failure: what was made, renamed and deleted there.

    Raises:
        OSError: the disk does not take it.
    """
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes a file's bytes outlast a power failure.

    Raises:
        OSError: the disk does not take them.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, for this user alone, where there is none.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)


def write_file(path: Path, text: str) -> None:
    """Writes a new file, for this user alone.

    Raises:
        OSError: the disk does not take it, or the file is there already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def overwrite_file(path: Path, text: str) -> None:
    """Writes over a file in place, padded with spaces to its length, which takes no room on the disk.

    A power failure meanwhile can leave a mixture of old and new.

    Raises:
        ValueError: the text is longer than the file.
        OSError: the disk does not take it.
    """
    with path.open("r+b") as stream:
        size_bytes, data = os.fstat(stream.fileno()).st_size, text.encode()
        if len(data) > size_bytes:
            raise ValueError("the text is longer than the file")
        stream.write(data.ljust(size_bytes))
        stream.flush()
        os.fsync(stream.fileno())
