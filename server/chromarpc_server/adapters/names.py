"""How adapters are named: `sha256:` and the hash of a file's content for requests, a display name for people."""

from __future__ import annotations

import re

from chromarpc_server.domain.errors import InvalidParameter

SUFFIX = ".safetensors"
HASH_PREFIX = "sha256:"
MAX_DISPLAY_NAME = 200
"""Characters."""


def hash_in(path: str) -> str | None:
    """The SHA-256 in a path `sha256:` and 64 lower-case hexadecimal digits; None for any other path."""
    found = re.fullmatch(HASH_PREFIX + r"([0-9a-f]{64})", path)
    return found[1] if found else None


def require_hash(text: str, field: str) -> str:
    """A SHA-256 in lower case.

    Raises:
        InvalidParameter: blaming `field`; these are not 64 hexadecimal digits.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise InvalidParameter("must be 64 hexadecimal digits", field=field)
    return text.lower()


def display_name(filename: str) -> str:
    """A client's file name as lists may show it: its last component, printable, of at most `MAX_DISPLAY_NAME`."""
    last = re.split(r"[/\\]", filename[-4 * MAX_DISPLAY_NAME :])[-1]
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in last)
    return plain if len(plain) <= MAX_DISPLAY_NAME else plain[: MAX_DISPLAY_NAME - 1] + "…"
