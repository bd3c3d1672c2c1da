"""Text in PNG files: read and added as iTXt chunks, without decoding the picture.

Layout: https://www.w3.org/TR/png-3/#11iTXt. A chunk is length, type, data, CRC of type and data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"IEND"
_TEXT = b"iTXt"


def insert(png: bytes, texts: Mapping[str, str]) -> bytes:
    """The same file with UTF-8 texts by keyword (1 to 79 Latin-1 characters) before its last chunk.

    Raises:
        ValueError: not a PNG, or one without an end.
    """
    for start, kind, _ in _chunks(png):
        if kind == _END:
            added = b"".join(_text_chunk(keyword, text) for keyword, text in texts.items())
            return png[:start] + added + png[start:]
    raise ValueError("the PNG has no end")


def read(png: bytes) -> dict[str, str]:
    """The uncompressed iTXt texts of a PNG by keyword.

    Raises:
        ValueError: not a PNG, or one without an end.
    """
    texts: dict[str, str] = {}
    for _, kind, data in _chunks(png):
        if kind == _END:
            return texts
        keyword, separator, rest = data.partition(b"\0")
        if kind == _TEXT and separator and rest[:1] == b"\0":
            # compression flag 0, its method, language, translated keyword, text
            text = rest[2:].split(b"\0", 2)[-1]
            texts[keyword.decode("latin-1")] = text.decode("utf-8", errors="replace")
    raise ValueError("the PNG has no end")


def _chunks(png: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    if not png.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    at = len(SIGNATURE)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        yield at, png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _text_chunk(keyword: str, text: str) -> bytes:
    body = _TEXT + keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8")
    return struct.pack(">I", len(body) - len(_TEXT)) + body + struct.pack(">I", zlib.crc32(body))
