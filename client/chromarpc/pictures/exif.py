"""Texts in EXIF: the user's comment, and what ComfyUI writes into the fields of camera and maker."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

MAX_ENTRIES: Final = 500
_EXIF_DIRECTORY: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_TEXT_TYPES: Final = (1, 2, 7)
"""Bytes, ASCII, undefined: one byte a value."""
_KEYWORDS: Final = ("prompt", "workflow")
"""What ComfyUI begins its texts with, before a colon."""


def read_exif(data: bytes) -> dict[str, str]:
    """Texts by keyword: `parameters` for the user's comment, `prompt` and `workflow` where they are ComfyUI's.

    What makes no sense is left out.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return {}
    found: dict[str, str] = {}
    try:
        main = dict(_entries(data, struct.unpack_from(f"{order}I", data, 4)[0], order))
        for kind, value in main.values():
            keyword, text = _keyword(value) if kind in _TEXT_TYPES else ("", "")
            if keyword:
                found.setdefault(keyword, text)
        pointer = main.get(_EXIF_DIRECTORY)
        if pointer is not None and len(pointer[1]) == 4:
            own = dict(_entries(data, struct.unpack(f"{order}I", pointer[1])[0], order))
            if _USER_COMMENT in own:
                comment = _comment(own[_USER_COMMENT][1], order)
                keyword, text = _keyword(comment.encode())
                found.setdefault(keyword or "parameters", text or comment)
    except struct.error:
        pass
    return found


def _entries(data: bytes, at: int, order: str) -> Iterator[tuple[int, tuple[int, bytes]]]:
    count = struct.unpack_from(f"{order}H", data, at)[0]
    for index in range(min(count, MAX_ENTRIES)):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, at + 2 + 12 * index)
        place = at + 2 + 12 * index + 8
        size = length * {3: 2, 4: 4}.get(kind, 1)
        if size > 4:
            place = struct.unpack_from(f"{order}I", data, place)[0]
        if kind in (*_TEXT_TYPES, 4) and place + size <= len(data):
            yield tag, (kind, data[place : place + size])


def _keyword(value: bytes) -> tuple[str, str]:
    """`prompt:{…}` as keyword and text; nothing where it is something else."""
    keyword, found, text = value.rstrip(b"\0").partition(b":")
    name = keyword.decode("latin-1").lower()
    if found and name in _KEYWORDS and text.lstrip()[:1] == b"{":
        return name, text.decode("utf-8", "replace")
    return "", ""


def _comment(value: bytes, order: str) -> str:
    """A comment after its eight bytes of encoding, whose byte order writers disagree about."""
    encoding, text = value[:8], value[8:]
    if not encoding.startswith(b"UNICODE"):
        return text.rstrip(b"\0").decode("utf-8", "replace")
    if text[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return text.decode("utf-16", "replace")
    zeros_first, zeros_second = text[0:4096:2].count(0), text[1:4096:2].count(0)
    by_file = "utf-16-be" if order == ">" else "utf-16-le"
    if zeros_first != zeros_second:
        by_file = "utf-16-be" if zeros_first > zeros_second else "utf-16-le"
    return text.decode(by_file, "replace").rstrip("\0")
