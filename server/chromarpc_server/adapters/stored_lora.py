"""What lists say of an adapter that the server has."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class LoraSource(StrEnum):
    """Where an adapter comes from."""

    ROOT = "root"
    UPLOAD = "upload"
    DOWNLOAD = "download"


@dataclass(frozen=True)
class StoredLora:
    """An adapter that requests can name."""

    path: str
    """As requests name it."""
    source: LoraSource
    size_bytes: int
    sha256: str
    """64 lower-case hexadecimal digits; empty for a file below the root that was not hashed yet."""
    modified: datetime
    filename: str = ""
    """What its uploader called it; printable, for people only."""
