"""Who owns an uploaded or downloaded adapter, and so which callers see it: a note beside each file, `<hash>.json`.

Files are kept by content, so that several callers may own one file: it is stored once, and each owner had to send
or fetch its bytes. Knowing a hash makes nobody an owner, and no answer reveals whether others own a file.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from chromarpc_server.domain.callers import NOBODY

NOTE_SUFFIX = ".json"


def owners_of(file: Path) -> dict[str, str]:
    """The owners of a file: callers' names, each with what this caller calls the file.

    A file whose note is missing or cannot be read belongs to `NOBODY`, the one caller of a server without a
    callers file.
    """
    try:
        noted = json.loads(file.with_suffix(NOTE_SUFFIX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {NOBODY.name: ""}
    if not isinstance(noted, dict):
        return {NOBODY.name: ""}
    owners = noted.get("owners", {NOBODY.name: noted.get("filename")})
    if not isinstance(owners, dict):
        return {NOBODY.name: ""}
    return {owner: name if isinstance(name, str) else "" for owner, name in owners.items()}


def note_owners(file: Path, owners: Mapping[str, str]) -> None:
    """Replaces the note of `file` atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    part = file.with_name(f"{secrets.token_hex(8)}.note")
    try:
        part.write_text(json.dumps({"owners": dict(owners)}), encoding="utf-8")
        os.replace(part, file.with_suffix(NOTE_SUFFIX))  # noqa: PTH105
    finally:
        part.unlink(missing_ok=True)
