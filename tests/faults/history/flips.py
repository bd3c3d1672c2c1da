"""Bits that rot: one bit of a stored file is flipped, and the file looks as it did before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path


def stored_images(data_dir: Path) -> Sequence[Path]:
    """Files of images that jobs name."""
    return _newest_first((data_dir / "jobs" / "images").glob("[0-9a-f][0-9a-f]/" + "[0-9a-f]" * 64))


def stored_uploads(data_dir: Path) -> Sequence[Path]:
    """Files of uploaded adapters."""
    return _newest_first((data_dir / "loras").glob("*.safetensors"))


def _newest_first(files: Iterable[Path]) -> Sequence[Path]:
    times = {}
    for path in files:
        with suppress(FileNotFoundError):  # deleted meanwhile
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=lambda path: (-times[path], path))


def flip(files: Sequence[Path], pick: float) -> str:
    """Flips a bit in one of the files, more often in one of the first, as clients ask for new jobs more often.
    Returns its SHA-256; empty where there is no file.
    """
    for path in files[int(len(files) * pick**3) :]:
        try:
            status = path.stat()
            with path.open("r+b") as file:
                # In the second half: what follows an adapter's header, and an image's.
                offset = int(status.st_size * (1 + pick) / 2)
                file.seek(offset)
                (byte,) = file.read(1)
                file.seek(offset)
                file.write(bytes([byte ^ 0x10]))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        except FileNotFoundError:  # deleted meanwhile
            continue
        return path.name.partition(".")[0]
    return ""
