"""The record in XMP, taken out as text: nothing is parsed as XML, so no entity is expanded, nothing fetched."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from typing import Final

XMP_MARK: Final = b"http://ns.adobe.com/xap/1.0/\0"
EXTENSION_MARK: Final = b"http://ns.adobe.com/xmp/extension/\0"
NAMESPACE: Final = "urn:chromarpc:picture"
_PREFIX: Final = re.compile(r"""xmlns:([A-Za-z_][\w.-]{0,63})\s*=\s*["']urn:chromarpc:picture["']""")
_ENTITY: Final = re.compile(r"&(?:(amp|lt|gt|quot|apos)|#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6}));")
_NAMED: Final = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}


def recorded_text(xmp: str) -> str | None:
    """The record's text, whether it stands in an element or in an attribute; None where there is none."""
    for prefix in dict.fromkeys(_PREFIX.findall(xmp)):
        name = f"{prefix}:record"
        start = xmp.find(f"<{name}")
        if start >= 0:
            begin = xmp.find(">", start) + 1
            end = xmp.find(f"</{name}", begin)
            if begin and end >= 0:
                return _unescaped(xmp[begin:end])
        attribute = xmp.find(f"{name}=")
        quote = xmp[attribute + len(name) + 1 : attribute + len(name) + 2]
        if attribute >= 0 and quote in ('"', "'"):
            begin = attribute + len(name) + 2
            end = xmp.find(quote, begin)
            if end >= 0:
                return _unescaped(xmp[begin:end])
    return None


def join_extension(parts: Sequence[bytes]) -> bytes:
    """XMP of several JPEG segments, each with its name, full length and offset; nothing where one is missing."""
    name = parts[0][:32]
    own = [part for part in parts if part[:32] == name]
    if any(len(part) < 40 for part in own):
        return b""
    placed = sorted((struct.unpack_from(">II", part, 32), part[40:]) for part in own)
    whole = b"".join(body for _, body in placed)
    expected = placed[0][0][0]
    is_whole = len(whole) == expected and hashlib.md5(
        whole, usedforsecurity=False
    ).hexdigest().upper() == name.decode("latin-1")
    return whole if is_whole else b""


def _unescaped(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        if found[1]:
            return _NAMED[found[1]]
        code = int(found[2]) if found[2] else int(found[3], 16)
        return chr(code) if code < 0x110000 else found[0]

    return _ENTITY.sub(character, text)
