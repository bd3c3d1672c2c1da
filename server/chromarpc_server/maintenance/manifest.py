"""What a backup says of itself: `manifest.json`, written last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from chromarpc_server.maintenance.report import CannotBeDone

FILE = "manifest.json"
FORMAT = 1

_NOTE = re.compile(r"(loras|downloads)/[0-9a-f]{64}\.json")


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
        is_whole = claimed == _checksum(values) and isinstance(values["format"], int)
    except FileNotFoundError:
        raise CannotBeDone(
            f"{folder} is no backup: it has no {FILE}; name the folder that a backup made"
        ) from None
    except OSError as error:
        raise CannotBeDone(f"{path} cannot be read ({error.strerror}): see to it, then run this again") from None
    except (ValueError, LookupError, AttributeError, TypeError):
        is_whole = False
    damaged = CannotBeDone(f"{path} is damaged, so that nothing vouches for the backup: take another one")
    if not is_whole:
        raise damaged
    if values["format"] != FORMAT:
        raise CannotBeDone(
            f"{path} was written by a newer chromarpc ({values.get('chromarpc')}): restore it with that"
        )
    if not _makes_sense(values):
        raise damaged
    return Manifest(**{**values, "left_out": tuple(values["left_out"])})


def _makes_sense(values: Mapping[str, Any]) -> bool:
    """Whether these are a manifest's values, and its notes lie where notes do: anybody can compute a checksum."""
    if values.keys() != {item.name for item in fields(Manifest)}:
        return False
    texts = [values[name] for name in ("chromarpc", "begun", "ended", "database_sha256")]
    notes, left_out, counts = values["notes"], values["left_out"], values["counts"]
    return (
        isinstance(values["schema"], int)
        and isinstance(values["with_downloads"], bool)
        and isinstance(counts, dict)
        and isinstance(notes, dict)
        and isinstance(left_out, list)
        and all(isinstance(text, str) for text in (*texts, *left_out, *notes.values()))
        and all(_NOTE.fullmatch(name) for name in notes)
    )


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
