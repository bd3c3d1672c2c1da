"""What to send: a request from options, from a JSON body, or from a picture that remembers its own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from chromarpc import png_text
from chromarpc.cli.exits import UsageError, say
from chromarpc.events import ImageFormat
from chromarpc.images import RECORD_KEY
from chromarpc.json_request import InvalidRequestJson, parse_request_json
from chromarpc.request import Lora
from chromarpc.v1 import generation_service_pb2, options_pb2

_FORMATS: dict[int, ImageFormat] = {
    options_pb2.IMAGE_FORMAT_PNG: "png",
    options_pb2.IMAGE_FORMAT_JPEG: "jpeg",
    options_pb2.IMAGE_FORMAT_WEBP: "webp",
    options_pb2.IMAGE_FORMAT_JPEG_TRAINER: "jpeg-trainer",
}


def parse_lora(text: str) -> Lora:
    """`PATH` or `PATH:MULTIPLIER`, and after either `#sha256=HASH` that the file must have.

    What follows the last colon is a multiplier only if it is a number. The hash of `sha256:HASH` never is, not
    even one that could be read as a number.
    """
    expected = re.fullmatch(r"(.+)#sha256=([0-9a-fA-F]*)", text, re.DOTALL)
    named, sha256 = (expected[1], expected[2]) if expected else (text, None)
    path, separator, multiplier = named.rpartition(":")
    if separator and path and path != "sha256":
        try:
            return Lora(path, float(multiplier), sha256)
        except ValueError:
            pass
    return Lora(named, expected_sha256=sha256)


def read_json_request(source: Path) -> generation_service_pb2.GenerateRequest:
    """The request of a JSON file, of a PNG that `chromarpc` saved, or of standard input (`-`).

    Keys that the schema does not have are left out, with a warning.

    Raises:
        UsageError: the file cannot be read, or is a picture without a record.
        InvalidRequestJson: it holds no request.
    """
    try:
        content = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None
    if content.startswith(png_text.SIGNATURE):
        content = _recorded_request(source, content)
    parsed = parse_request_json(content)
    for path in parsed.unknown:
        say(f"warning: {path}: unknown, left out")
    return parsed.request


def request_format(output: options_pb2.OutputOptions) -> ImageFormat:
    """The format that images come in."""
    return _FORMATS.get(output.format, "png")


def _recorded_request(source: Path, picture: bytes) -> bytes:
    try:
        record = json.loads(png_text.read(picture)[RECORD_KEY])
        return json.dumps(record["request"]).encode()
    except KeyError:
        raise UsageError(f"{source}: this picture does not say what it was drawn with") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequestJson("", f"the picture's record cannot be read: {error}") from None
