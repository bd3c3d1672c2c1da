"""Uploaded and downloaded adapters as tools see them: a file named by its SHA-256, and a note of its owners."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.adapters.content_store import ContentStore, entries_of
from chromarpc_server.adapters.names import SUFFIX
from chromarpc_server.adapters.owners import NOTE_SUFFIX, note_of, parse_note
from chromarpc_server.adapters.process_folder import ProcessFolder
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.maintenance.files import damage_of
from chromarpc_server.maintenance.layout import HASH, STAGING, DataFolder


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
        return note_of(self.file)

    def damage(self) -> str | None:
        """Why the file is not what its name promises; None where it is."""
        return damage_of(self.file, self.sha256)

    def note_damage(self) -> str | None:
        """Why the owners cannot be read; None where they can, or where there is no note."""
        try:
            parse_note(self.note.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"the note of its owners cannot be read ({error.strerror})"
        except ValueError:
            return "the note of its owners is damaged"
        return None


def contents_of(folder: Path) -> Iterator[Content]:
    """Everything in a folder that is named by a hash, sorted; a note without its file too."""
    stems = {
        path.stem
        for path in (Path(entry.path) for entry in entries_of(folder))
        if path.suffix in (SUFFIX, NOTE_SUFFIX) and HASH.fullmatch(path.stem)
    }
    for stem in sorted(stems):
        yield Content(folder / f"{stem}{SUFFIX}")


def remove_leftovers(folder: DataFolder) -> None:
    """Removes what tools that were cut left of their work; nothing of it is whole."""
    for path in (*folder.jobs.glob("*.part"), *folder.jobs.glob("*.part.source"), folder.root / STAGING):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_half_written(folder: DataFolder) -> int:
    """Removes what cut writes left, but for that of processes that live. Returns how many files."""
    found = folder.half_written()
    ProcessFolder(folder.uploads).remove_abandoned()
    ContentStore(folder.downloads, LoraSource.DOWNLOAD).unfinished.remove_abandoned()
    for path in found:
        if path.parent in (folder.loras, folder.downloads) or path.is_relative_to(folder.images):
            path.unlink(missing_ok=True)
    return sum(not path.exists() for path in found)
