"""What to send: a request from options or from a JSON body."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from chromarpc.cli.exits import UsageError, say
from chromarpc.events import ImageFormat
from chromarpc.json_request import parse_request_json
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


def read_source(source: Path) -> bytes:
    """What `--json` names: a file, or standard input (`-`).

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None


def parse_body(content: bytes) -> generation_service_pb2.GenerateRequest:
    """The request of a JSON body; keys that the schema does not have are left out, with a warning.

    Raises:
        InvalidRequestJson: it holds no request.
    """
    parsed = parse_request_json(content)
    for path in parsed.unknown:
        say(f"warning: {path}: unknown, left out")
    return parsed.request


def request_format(output: options_pb2.OutputOptions) -> ImageFormat:
    """The format that images come in."""
    return _FORMATS.get(output.format, "png")
