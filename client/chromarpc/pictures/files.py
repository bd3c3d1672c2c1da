"""Texts of picture files, which strangers wrote: PNG, JPEG and WebP, within limits and without decoding a pixel.

Layouts: PNG (https://www.w3.org/TR/png-3/), JPEG (ITU-T T.81) with EXIF and XMP in APP1 (XMP Specification
Part 3), WebP (https://developers.google.com/speed/webp/docs/riff_container).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from chromarpc.pictures.exif import read_exif
from chromarpc.pictures.xmp import EXTENSION_MARK, XMP_MARK, join_extension, recorded_text

MAX_FILE_BYTES: Final = 256 * 1024**2
MAX_TEXT_BYTES: Final = 8 * 1024**2
"""All texts of one file together, inflated."""
MAX_CHUNKS: Final = 500_000
PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
RECORD_KEY: Final = "chromarpc"
"""Of the record among the texts, whatever kind of file it comes from."""
PARAMETERS_KEY: Final = "parameters"
"""Of the text for people: PNG text of that keyword, EXIF's UserComment elsewhere."""
_JPEG_START: Final = b"\xff\xd8\xff"
_EXIF_MARK: Final = b"Exif\0\0"


class NoPicture(Exception):
    """Bytes that are no picture, or one that cannot be read; a sentence for people."""


@dataclass(frozen=True)
class PictureFile:
    """What a file says of itself."""

    kind: str
    """`PNG`, `JPEG` or `WebP`."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    texts: dict[str, str] = field(repr=False)
    """By keyword: a PNG's own; in other files `chromarpc` and `parameters`, and ComfyUI's `prompt`, `workflow`."""


def kind_of(data: bytes) -> str:
    """`PNG`, `JPEG` or `WebP`, as the bytes begin; empty where they are no picture that can be read here."""
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(_JPEG_START):
        return "JPEG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def read_picture(data: bytes) -> PictureFile:
    """The size and the texts of a picture's file.

    Raises:
        NoPicture: it is none, is cut short, or says more than a picture has to say.
    """
    try:
        match kind_of(data):
            case "PNG":
                return _read_png(data)
            case "JPEG":
                return _read_jpeg(data)
            case "WebP":
                return _read_webp(data)
    except (struct.error, IndexError, zlib.error):
        raise NoPicture("is a broken picture") from None
    raise NoPicture("is no PNG, JPEG or WebP")


class _Texts:
    """Texts so far, and how much more there may be."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._left_bytes = MAX_TEXT_BYTES

    def add(self, keyword: str, text: bytes, encoding: str) -> None:
        """Keeps the first text of each keyword."""
        self.take(len(text))
        self.found.setdefault(keyword, text.decode(encoding, "replace"))

    def inflate(self, data: bytes) -> bytes:
        """What was deflated, where it is not more than may be."""
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(data, self._left_bytes + 1)
        if len(inflated) > self._left_bytes:
            raise NoPicture(f"holds more than {MAX_TEXT_BYTES} bytes of text")
        if not inflater.eof:
            raise NoPicture("is a broken picture")
        return inflated

    def take(self, size: int) -> None:
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise NoPicture(f"holds more than {MAX_TEXT_BYTES} bytes of text")

    def add_exif(self, exif: bytes) -> None:
        self.take(len(exif))
        for keyword, text in read_exif(exif).items():
            self.found.setdefault(keyword, text)

    def add_xmp(self, xmp: bytes) -> None:
        self.take(len(xmp))
        record = recorded_text(xmp.decode("utf-8", "replace"))
        if record is not None:
            self.found.setdefault(RECORD_KEY, record)


def _read_png(data: bytes) -> PictureFile:
    texts = _Texts()
    size: tuple[int, int] | None = None
    for kind, body in _png_chunks(data):
        if size is None:
            if kind != b"IHDR":
                raise NoPicture("is a broken PNG")
            size = struct.unpack_from(">II", body)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            _add_png_text(kind, bytes(body), texts)
        elif kind == b"eXIf":
            texts.add_exif(bytes(body))
    if size is None:
        raise NoPicture("is a broken PNG")
    return PictureFile("PNG", *size, texts.found)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view = memoryview(data)
    at = len(PNG_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        length = struct.unpack_from(">I", data, at)[0]
        kind = data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            raise NoPicture("is a PNG that was cut short")
        if kind == b"IEND":
            return
        yield kind, view[at + 8 : at + 8 + length]
        at += 12 + length
    raise NoPicture("is a PNG of too many parts")


def _add_png_text(kind: bytes, body: bytes, texts: _Texts) -> None:
    keyword, found, rest = body.partition(b"\0")
    if not found or not 1 <= len(keyword) <= 79:
        return
    name = keyword.decode("latin-1")
    if kind == b"tEXt":
        # Latin-1 by the standard; some programs write UTF-8 all the same.
        texts.add(name, rest, "utf-8" if _is_utf8(rest) else "latin-1")
    elif kind == b"zTXt":
        texts.add(name, texts.inflate(rest[1:]), "latin-1")
    elif len(rest) >= 2:
        _, _, text = rest[2:].partition(b"\0")
        _, _, text = text.partition(b"\0")
        texts.add(name, texts.inflate(text) if rest[0] else text, "utf-8")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


_SIZED: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers of frames, which say how large the picture is."""


def _read_jpeg(data: bytes) -> PictureFile:
    texts = _Texts()
    extensions: list[bytes] = []
    size: tuple[int, int] | None = None
    at = 2
    for _ in range(MAX_CHUNKS):
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise NoPicture("is a broken JPEG")
        marker = data[at + 1]
        length = struct.unpack_from(">H", data, at + 2)[0]
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise NoPicture("is a JPEG that was cut short")
        if marker in _SIZED:
            height, width = struct.unpack_from(">HH", body, 1)
            size = width, height
        elif marker == 0xE1 and body.startswith(_EXIF_MARK):
            texts.add_exif(body[len(_EXIF_MARK) :])
        elif marker == 0xE1 and body.startswith(XMP_MARK):
            texts.add_xmp(body[len(XMP_MARK) :])
        elif marker == 0xE1 and body.startswith(EXTENSION_MARK):
            texts.take(len(body))
            extensions.append(body[len(EXTENSION_MARK) :])
        elif marker == 0xDA:  # pixels follow
            break
        at += 2 + length
    if size is None:
        raise NoPicture("is a broken JPEG")
    if extensions:
        texts.add_xmp(join_extension(extensions))
    return PictureFile("JPEG", *size, texts.found)


def _read_webp(data: bytes) -> PictureFile:
    texts = _Texts()
    size: tuple[int, int] | None = None
    at, end = 12, struct.unpack_from("<I", data, 4)[0] + 8
    if end > len(data):
        raise NoPicture("is a WebP that was cut short")
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            break
        kind, length = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        body = data[at + 8 : at + 8 + min(length, MAX_TEXT_BYTES + 1 if kind in (b"EXIF", b"XMP ") else 16)]
        if at + 8 + length > end:
            raise NoPicture("is a WebP that was cut short")
        size = size or _webp_size(kind, body)
        if kind == b"EXIF":
            texts.add_exif(body.removeprefix(_EXIF_MARK))
        elif kind == b"XMP ":
            texts.add_xmp(body)
        at += 8 + length + length % 2
    if size is None:
        raise NoPicture("is a broken WebP")
    return PictureFile("WebP", *size, texts.found)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
