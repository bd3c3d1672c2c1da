"""Answers that list: how much one of them holds, and where the next one continues."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Final

from google.protobuf.message import Message

MAX_PAGE_BYTES: Final = 2**20
"""Of one answer; stock clients take 4 MiB. The first entry is in it in any case."""
_FRAME_BYTES: Final = 6
"""An entry's tag and length."""
_TOKEN_BYTES: Final = 16 * 2**10
"""Kept free for the token of the next page and whatever else is said beside the entries."""


class Page:
    """Room for entries of an answer."""

    def __init__(self, max_entries: int) -> None:
        """`max_entries`: as many were asked for."""
        self._entries_left = max_entries
        self._bytes_left = MAX_PAGE_BYTES - _TOKEN_BYTES
        self._is_empty = True

    @property
    def entries_left(self) -> int:
        """How many more may be taken, if they are small."""
        return self._entries_left

    def takes(self, entry: Message) -> bool:
        """Whether an entry still fits; its room is then taken."""
        size = entry.ByteSize() + _FRAME_BYTES
        if not self._is_empty and (self._entries_left < 1 or size > self._bytes_left):
            return False
        self._is_empty = False
        self._entries_left -= 1
        self._bytes_left -= size
        return True


def page_token(place: tuple[int, str]) -> str:
    """The token of the page that follows an entry's place in the list."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def token_place(token: str) -> tuple[int, str] | None:
    """The inverse; None for a text that is no such token."""
    try:
        match json.loads(base64.b64decode(token, altchars=b"-_", validate=True)):
            case [int(number), str(name)]:
                return number, name
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        pass
    return None
