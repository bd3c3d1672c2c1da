"""Files that nothing names, in lost+found and in quarantine: whose they are, as far as anything says so."""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from pathlib import Path

from chromarpc_server.adapters.names import SUFFIX
from chromarpc_server.adapters.owners import NOTE_SUFFIX, note_text, owners_of
from chromarpc_server.durable import write_file
from chromarpc_server.jobs.store.images import owners_noted
from chromarpc_server.maintenance.contents import Content
from chromarpc_server.maintenance.files import ListedFile, files_below, set_owners

ROWS = "rows"
"""Folder of jobs whose rows could not be read, a JSON file for each."""


def is_row(path: Path) -> bool:
    """Whether this is a job that was moved out of the database."""
    return path.parent.name == ROWS and path.suffix == NOTE_SUFFIX


def is_note(path: Path) -> bool:
    """Whether this says whose the adapter beside it is."""
    return path.suffix == NOTE_SUFFIX and not is_row(path) and path.with_suffix(SUFFIX).exists()


def owners_kept(path: Path) -> frozenset[str] | None:
    """The callers whose a file is; None where nothing says so."""
    if is_row(path):
        try:
            return frozenset({str(json.loads(path.read_bytes())["owner"])})
        except (OSError, ValueError, LookupError, TypeError):
            return None
    if path.suffix == SUFFIX:
        content = Content(path)
        if not content.note.exists() or content.note_damage() is not None:
            return None
        return frozenset(owners_of(path))
    return owners_noted(path)


def remove_kept(path: Path) -> None:
    """Deletes a file, and with an adapter its note.

    Raises:
        OSError: the folder cannot be written.
    """
    path.unlink(missing_ok=True)
    if path.suffix == SUFFIX:
        Content(path).note.unlink(missing_ok=True)


def disown_kept(path: Path, name: str) -> None:
    """Leaves a file to its other owners.

    Raises:
        OSError: the folder cannot be written.
    """
    if path.suffix == SUFFIX:
        note = Content(path).note
        part = note.with_name(f"{secrets.token_hex(8)}.part")
        write_file(part, note_text({owner: label for owner, label in owners_of(path).items() if owner != name}))
        part.replace(note)
    else:
        set_owners(path, (owners_noted(path) or frozenset()) - {name})


def listed(folder: Path) -> list[ListedFile]:
    """What lies below a folder, notes with their files."""
    found = []
    for path in files_below(folder):
        with suppress(OSError):
            if not is_note(path):
                owners = owners_kept(path)
                size_bytes = path.lstat().st_size
                name = path.relative_to(folder).as_posix()
                found.append(ListedFile(name, size_bytes, None if owners is None else tuple(sorted(owners))))
    return found
