"""What to send: a request from options or from a JSON body."""

from __future__ import annotations

import codecs
import json
import re
import sys
from pathlib import Path

import typer
from google.protobuf import json_format

from chromarpc.cli.exits import UsageError, say
from chromarpc.events import ImageFormat
from chromarpc.json_request import parse_request_json
from chromarpc.request import Lora
from chromarpc.v1 import generation_service_pb2, options_pb2

MAX_BYTES = 64 * 2**20
"""More than the largest picture that holds a request."""
_PICTURES = {
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "AVIF or HEIF": re.compile(rb".{4}ftyp(?:avi|hei|hev|mif)", re.DOTALL),
    "BMP": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
}
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
        UsageError: the file cannot be read, or is larger than any that holds a request.
    """
    try:
        if str(source) == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with source.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{source}: more than {MAX_BYTES // 2**20} MiB, which no request has")
    return content


def parse_body(source: Path, content: bytes) -> generation_service_pb2.GenerateRequest:
    """The request of a JSON body; keys that the schema does not have are left out, with a warning.

    Raises:
        UsageError: it is something else entirely.
        InvalidRequestJson: it holds no request.
    """
    _require_text(source, content)
    parsed = parse_request_json(content)
    for path in parsed.unknown:
        say(f"warning: {path}: unknown, left out")
    return parsed.request


def print_request(request: generation_service_pb2.GenerateRequest) -> None:
    """Prints a request as a JSON body that `--json` takes."""
    body = json_format.MessageToDict(request, preserving_proto_field_name=True)
    for prompt in body.get("prompts", ()):  # protobuf writes whole numbers of 64 bits as text
        if "seed" in prompt:
            prompt["seed"] = int(prompt["seed"])
    typer.echo(json.dumps(body, indent=2))


def _require_text(source: Path, content: bytes) -> None:
    if not content.strip():
        raise UsageError(f"{source}: is empty")
    kind = next((name for name, pattern in _PICTURES.items() if pattern.match(content)), None)
    if kind is not None:
        raise UsageError(f"{source}: is a picture ({kind}), and only PNG, JPEG and WebP can hold a request")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return  # text, and JSON's own business
    try:
        content.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{source}: is neither text nor a PNG, JPEG or WebP, so it holds no request") from None


def request_format(output: options_pb2.OutputOptions) -> ImageFormat:
    """The format that images come in."""
    return _FORMATS.get(output.format, "png")
