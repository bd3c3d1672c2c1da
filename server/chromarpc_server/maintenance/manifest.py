"""What a backup says of itself: `manifest.json`, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chromarpc_server.maintenance.report import CannotBeDone

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Images and adapters are named by their hashes; the hashes of everything else are here."""

    chromarpc: str
    """Version that made the backup."""
    schema: int
    """Of the database."""
    begun: str
    """RFC 3339."""
    ended: str
    database_sha256: str
    with_downloads: bool
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each note of owners, by its path in the backup."""
    left_out: tuple[str, ...] = ()
    """Paths of files that were damaged or gone when the backup was made."""
    format: int = FORMAT

    def write(self, folder: Path) -> Path:
        """Puts it into a backup, with a checksum. Returns the file.

        Raises:
            OSError: it cannot be written.
        """
        values = asdict(self)
        path = folder / FILE
        path.touch(mode=0o600)
        path.write_text(json.dumps({**values, "sha256": _checksum(values)}, indent=1) + "\n", encoding="utf-8")
        return path


def read_manifest(folder: Path) -> Manifest:
    """What a backup says of itself.

    Raises:
        CannotBeDone: it is no backup, a newer version's, or its manifest is damaged.
    """
    path = folder / FILE
    try:
        values: Any = json.loads(path.read_bytes())
        claimed = values.pop("sha256")
        is_whole = claimed == _checksum(values)
    except FileNotFoundError:
        raise CannotBeDone(
            f"{folder} is no backup: it has no {FILE}; name the folder that a backup made"
        ) from None
    except OSError as error:
        raise CannotBeDone(f"{path} cannot be read ({error.strerror}): see to it, then run this again") from None
    except (ValueError, LookupError, AttributeError, TypeError):
        is_whole = False
    if not is_whole:
        raise CannotBeDone(f"{path} is damaged, so that nothing vouches for the backup: take another one")
    if values["format"] != FORMAT:
        raise CannotBeDone(
            f"{path} was written by a newer chromarpc ({values['chromarpc']}): restore it with that"
        )
    return Manifest(**{**values, "left_out": tuple(values["left_out"])})


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
