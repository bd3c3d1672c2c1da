"""Whose an uploaded or downloaded adapter is: a note beside each file, `<hash>.json`.

Files are kept by content, so that one file may be several callers': it lies there once, and each of them had to
have its bytes. Knowing a hash gives nobody a file, and no answer tells whether others have it.
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
    """Each owner of the adapter, with what it calls the file.

    One without a note, or with one that cannot be read, is that of servers that do not tell callers apart.
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
    """Writes the note of `file` at one stroke.

    Raises:
        OSError: the folder cannot be written.
    """
    part = file.with_name(f"{secrets.token_hex(8)}.note")
    try:
        part.write_text(json.dumps({"owners": dict(owners)}), encoding="utf-8")
        os.replace(part, file.with_suffix(NOTE_SUFFIX))  # noqa: PTH105
    finally:
        part.unlink(missing_ok=True)
