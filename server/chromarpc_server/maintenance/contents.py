"""Uploaded and downloaded adapters as tools see them: a file named by its SHA-256, and a note of its owners."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.adapters.content_store import entries_of
from chromarpc_server.adapters.names import SUFFIX
from chromarpc_server.adapters.owners import NOTE_SUFFIX
from chromarpc_server.maintenance.files import damage_of
from chromarpc_server.maintenance.layout import HASH


@dataclass(frozen=True)
class Content:
    """A file, a note, or both."""

    file: Path
    """Need not exist."""

    @property
    def sha256(self) -> str:
        """Of the file's bytes, as its name has it."""
        return self.file.stem

    @property
    def note(self) -> Path:
        """Need not exist."""
        return self.file.with_suffix(NOTE_SUFFIX)

    def damage(self) -> str | None:
        """Why the file is not what its name promises; None where it is."""
        return damage_of(self.file, self.sha256)

    def note_damage(self) -> str | None:
        """Why the owners cannot be read; None where they can, or where there is no note."""
        try:
            noted = json.loads(self.note.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"the note of its owners cannot be read ({error.strerror})"
        except (ValueError, RecursionError):
            return "the note of its owners is damaged"
        # A note of the first version names a file and no owner.
        is_whole = isinstance(noted, dict) and isinstance(noted.get("owners", {}), dict)
        return None if is_whole else "the note of its owners is damaged"


def contents_of(folder: Path) -> Iterator[Content]:
    """Everything in a folder that is named by a hash, sorted; a note without its file too."""
    stems = {
        path.stem
        for path in (Path(entry.path) for entry in entries_of(folder))
        if path.suffix in (SUFFIX, NOTE_SUFFIX) and HASH.fullmatch(path.stem)
    }
    for stem in sorted(stems):
        yield Content(folder / f"{stem}{SUFFIX}")
