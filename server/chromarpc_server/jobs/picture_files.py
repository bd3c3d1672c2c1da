"""Puts a record into an image's file: PNG text, or EXIF and XMP in JPEG and WebP; pixels are not touched.

EXIF holds the text for people, XMP the record. Layouts: PNG (https://www.w3.org/TR/png-3/#11textinfo), WebP
(https://developers.google.com/speed/webp/docs/riff_container), JPEG's APP1 segments of EXIF and XMP (XMP
Specification Part 3, with its extension for more than one segment).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Final

from chromarpc_server.domain.requests import ImageFormat
from chromarpc_server.jobs.picture_record import PictureRecord

RECORD_KEY: Final = "chromarpc"
"""PNG text keyword of the record."""
PARAMETERS_KEY: Final = "parameters"
"""PNG text keyword of the text for people."""
NAMESPACE: Final = "urn:chromarpc:picture"
"""Of the record in XMP, whose property is `record`."""
_PNG_HEAD_BYTES: Final = 8 + 25
"""Signature and IHDR, which is always first."""
_EXIF_MARK: Final = b"Exif\0\0"
_XMP_MARK: Final = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_MORE_MARK: Final = b"http://ns.adobe.com/xmp/extension/\0"
_SEGMENT_BYTES: Final = 65_533
"""What one JPEG segment holds."""
_XMP_PART_BYTES: Final = 65_000


def with_record(data: bytes, image_format: ImageFormat, record: PictureRecord) -> bytes:
    """The same image with its record.

    Args:
        data: as this server's encoder wrote it.
        image_format: what it is.
        record: what to put in.
    """
    match image_format:
        case ImageFormat.PNG:
            return _into_png(data, record)
        case ImageFormat.JPEG | ImageFormat.JPEG_TRAINER:
            return _into_jpeg(data, record)
        case ImageFormat.WEBP:
            return _into_webp(data, record)


def _into_png(data: bytes, record: PictureRecord) -> bytes:
    # Before the pixels: many programs read no text that comes after them.
    texts = _png_text(PARAMETERS_KEY, record.parameters) + _png_text(RECORD_KEY, record.text)
    return data[:_PNG_HEAD_BYTES] + texts + data[_PNG_HEAD_BYTES:]


def _png_text(keyword: str, text: str) -> bytes:
    body = b"iTXt" + keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _into_jpeg(data: bytes, record: PictureRecord) -> bytes:
    at = 2  # after the start of image, and after JFIF's segment, which has to be the first
    if data[at : at + 2] == b"\xff\xe0":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    segments = b""
    exif = _EXIF_MARK + _exif(record.parameters)
    if len(exif) <= _SEGMENT_BYTES:  # else people read it in the record
        segments += _segment(exif)
    xmp = _XMP_MARK + _xmp(_property(record.text))
    if len(xmp) <= _SEGMENT_BYTES:
        segments += _segment(xmp)
    else:
        segments += _extended_xmp(record.text)
    return data[:at] + segments + data[at:]


def _segment(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def _extended_xmp(text: str) -> bytes:
    """XMP of more than one segment: the first names the others by their MD5."""
    whole = _xmp_meta(_property(text)).encode()
    name = hashlib.md5(whole, usedforsecurity=False).hexdigest().upper()
    reference = (
        f'<xmpNote:HasExtendedXMP xmlns:xmpNote="http://ns.adobe.com/xmp/note/">{name}</xmpNote:HasExtendedXMP>'
    )
    segments = _segment(_XMP_MARK + _xmp(reference))
    for offset in range(0, len(whole), _XMP_PART_BYTES):
        part = whole[offset : offset + _XMP_PART_BYTES]
        segments += _segment(_XMP_MORE_MARK + name.encode() + struct.pack(">II", len(whole), offset) + part)
    return segments


def _into_webp(data: bytes, record: PictureRecord) -> bytes:
    first = data[12:16]
    if first == b"VP8X":
        flags, canvas, chunks = data[20], data[24:30], data[30:]
    else:
        flags, canvas, chunks = 0, _webp_canvas(data), data[12:]
    extended = _webp_chunk(b"VP8X", bytes([flags | 0x0C, 0, 0, 0]) + canvas)  # it has EXIF and XMP
    body = extended + chunks + _webp_chunk(b"EXIF", _exif(record.parameters))
    body += _webp_chunk(b"XMP ", _xmp(_property(record.text)))
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_canvas(data: bytes) -> bytes:
    """Width and height, each less one and in three bytes, of a file of one lossy image."""
    if data[12:16] != b"VP8 ":
        raise ValueError("not a lossy WebP")
    sides = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return b"".join((side - 1).to_bytes(3, "little") for side in sides)


def _webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _exif(text: str) -> bytes:
    """EXIF with one entry: the user's comment, as UTF-16 in the file's byte order."""
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    main = struct.pack(">H HHII I", 1, 0x8769, 4, 1, 26, 0)  # one entry: where the EXIF directory is
    own = struct.pack(">H HHII I", 1, 0x9286, 7, len(comment), 44, 0)  # one entry: UserComment
    return b"MM\0\x2a\0\0\0\x08" + main + own + comment


def _property(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<chromarpc:record xmlns:chromarpc="{NAMESPACE}">{escaped}</chromarpc:record>'


def _xmp_meta(properties: str) -> str:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="">{properties}</rdf:Description></rdf:RDF></x:xmpmeta>'
    )


def _xmp(properties: str) -> bytes:
    packet = f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{_xmp_meta(properties)}<?xpacket end="r"?>'
    return packet.encode()
