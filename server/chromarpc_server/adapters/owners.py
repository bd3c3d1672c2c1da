"""Who owns an uploaded or downloaded adapter, and so which callers see it: a note beside each file, `<hash>.json`.

Files are kept by content, so that several callers may own one file: it is stored once, and each owner had to send
or fetch its bytes. Knowing a hash makes nobody an owner, and no answer reveals whether others own a file.

A note is `{"owners": {NAME: FILENAME, …}, "sha256": HASH}`, the hash being that of the owners as canonical JSON.
Notes of earlier versions have none, and the first ones only a `filename`.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chromarpc_server.adapters.damage import report_damage
from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.durable import overwrite_file

NOTE_SUFFIX = ".json"


def note_of(file: Path) -> Path:
    """Where the note of a file lies."""
    return file.with_suffix(NOTE_SUFFIX)


def owners_of(file: Path) -> dict[str, str]:
    """The owners of a file as `read_owners` gives them; none while the note cannot be read."""
    try:
        return read_owners(file)
    except OSError:
        return {}


def read_owners(file: Path) -> dict[str, str]:
    """The owners of a file: callers' names, each with what this caller calls the file.

    A file without a note belongs to `NOBODY`, the one caller of a server without a callers file. One whose note is
    damaged has no owner, so that nobody sees it, until somebody sends its bytes again.

    Raises:
        OSError: the note is there and cannot be read, which says nothing of the owners.
    """
    try:
        data = note_of(file).read_bytes()
    except FileNotFoundError:
        return {NOBODY.name: ""}
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        data = b""
    try:
        return parse_note(data)
    except ValueError:
        report_damage(file.stem, "owners")
        return {}


def parse_note(data: bytes) -> dict[str, str]:
    """The owners that a note names.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _parse(json.loads(data))
    except RecursionError:
        raise ValueError("this is no note of owners") from None


def note_text(owners: Mapping[str, str]) -> str:
    """The note of a file with these owners."""
    return json.dumps({"owners": dict(owners), "sha256": _checksum(owners)})


def shorten_note(file: Path, owners: Mapping[str, str]) -> None:
    """Writes a note with fewer owners over the one that is there, which takes no room on the disk.

    Not atomic: if the power fails within it, the file may be nobody's.

    Raises:
        OSError: the disk does not take it.
    """
    note, text = note_of(file), note_text(owners)
    if len(text) > note.stat().st_size:
        text = json.dumps({"owners": dict(owners)})  # as in the note of an earlier version that it replaces
    overwrite_file(note, text)


def _parse(noted: Any) -> dict[str, str]:
    """The owners that a note names.

    Raises:
        ValueError: this is no note, or its checksum is another one.
    """
    match noted:
        case {"owners": dict() as owners, "sha256": str() as checksum, **rest} if not rest:
            if not all(isinstance(name, str) for name in owners.values()) or _checksum(owners) != checksum:
                raise ValueError("the checksum is another one")
            return owners
        case {"owners": dict() as owners, **rest} if not rest:
            return {owner: name if isinstance(name, str) else "" for owner, name in owners.items()}
        case {"filename": name, **rest} if not rest:
            return {NOBODY.name: name if isinstance(name, str) else ""}
    raise ValueError("this is no note of owners")


def _checksum(owners: Mapping[str, str]) -> str:
    canonical = json.dumps(dict(owners), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
