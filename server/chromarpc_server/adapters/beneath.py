"""Reaches files below a folder and nothing outside it, even if a part of the path is replaced by a link meanwhile.

A path that was checked may lead elsewhere a moment later. Here each folder on the way is opened from the one above
it and no link is followed, as Linux's `openat2` does with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, but with what
every POSIX system has. Callers resolve links before; a path that has become a link since then is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePath

_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
_PASS: int = getattr(os, "O_PATH", os.O_RDONLY) | _DIRECTORY
"""To go through a folder, which on Linux needs no right to list it."""
_READ: int = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Without waiting for anybody to write to a pipe."""


def status_below(folder: Path, below: PurePath) -> os.stat_result:
    """What lies there; of a link itself, not of what it leads to.

    Args:
        folder: may be reached through links.
        below: relative to it, without `..`.

    Raises:
        OSError: nothing lies there, or there is a link on the way.
    """
    with _opened(folder, below.parent) as parent:
        return os.stat(below.name, dir_fd=parent, follow_symlinks=False)


def open_below(
    folder: Path, below: PurePath, is_wanted: Callable[[os.stat_result], bool]
) -> BufferedReader | None:
    """Opens a file to be read; None where it is not wanted.

    Args:
        folder: may be reached through links.
        below: relative to it, without `..`.
        is_wanted: is asked before and after the file is opened. It should want regular files only, as opening a
            device may have effects.

    Raises:
        OSError: nothing lies there, there is a link on the way, or it may not be read.
    """
    with _opened(folder, below.parent) as parent:
        if not is_wanted(os.stat(below.name, dir_fd=parent, follow_symlinks=False)):
            return None
        descriptor = os.open(below.name, _READ | _NO_LINK, dir_fd=parent)
    try:
        stream = os.fdopen(descriptor, "rb") if is_wanted(os.fstat(descriptor)) else None
    except BaseException:
        os.close(descriptor)
        raise
    if stream is None:
        os.close(descriptor)
    return stream


def entries_below(folder: Path, below: PurePath) -> list[tuple[str, bool]]:
    """What lies in a folder, by name, each with whether it is a folder; a link to one is none.

    Raises:
        OSError: no such folder, there is a link on the way, or it may not be listed.
    """
    found = []
    with _opened(folder, below, last=os.O_RDONLY | _DIRECTORY) as descriptor, os.scandir(descriptor) as entries:
        for entry in entries:
            try:
                found.append((entry.name, entry.is_dir(follow_symlinks=False)))
            except OSError:
                continue
    return sorted(found)


@contextmanager
def _opened(folder: Path, below: PurePath, last: int = _PASS) -> Iterator[int]:
    """A descriptor of the folder `below`, opened with the flags `last`."""
    names = below.parts
    descriptor = os.open(folder, _PASS if names else last)
    try:
        for index, name in enumerate(names, 1):
            inner = os.open(name, (last if index == len(names) else _PASS) | _NO_LINK, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
