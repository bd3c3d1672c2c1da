"""A finished image: its bytes, and everything that is needed to draw it again."""

from __future__ import annotations

import io
import json
import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from chromarpc import png_text
from chromarpc.record import parameters_line, run_record

if TYPE_CHECKING:
    from PIL import Image

    from chromarpc.events import Accepted, JobWarning, PlannedPrompt, Prepared

RECORD_KEY = "chromarpc"
"""PNG text keyword of the JSON that repeats the run."""
PARAMETERS_KEY = "parameters"
"""PNG text keyword of the same for people, which many viewers show."""

TEMPORARY_PREFIX = ".chromarpc-"
"""Begins the names of files that are being written."""


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image as the server encoded it, checked against the SHA-256 it announced."""

    prompt_index: int
    data: bytes = field(repr=False)
    """The encoded file, exactly as sent."""
    media_type: str
    """`image/png`, `image/jpeg` or `image/webp`."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    sha256: str
    """Of `data`, hexadecimal."""
    seed: int
    plan: Accepted = field(repr=False)
    """The request as it was run."""
    prepared: Prepared | None = field(repr=False)
    """What adapters, weights and versions it was run with."""

    @cached_property
    def image(self) -> Image.Image:
        """The picture, decoded on first use.

        Raises:
            PIL.UnidentifiedImageError: the bytes are no picture.
        """
        from PIL import Image  # noqa: PLC0415 - callers who only save the bytes need no decoder

        picture = Image.open(io.BytesIO(self.data))
        picture.load()
        return picture

    @property
    def prompt(self) -> PlannedPrompt:
        """What was drawn."""
        return self.plan.prompts[self.prompt_index]

    @property
    def warnings(self) -> tuple[JobWarning, ...]:
        """Warnings about this image or about the whole request, not those about its other prompts."""
        everything = self.plan.warnings + (self.prepared.warnings if self.prepared else ())
        own = f"prompts.{self.prompt_index}."
        return tuple(
            warning
            for warning in everything
            if not warning.field.startswith("prompts.") or f"{warning.field}.".startswith(own)
        )

    def record(self) -> dict[str, object]:
        """The run as JSON values; its `request` is a request body that draws this image again."""
        return run_record(self)

    def file_bytes(self) -> bytes:
        """The file to keep: as sent.

        Older servers wrote no record into pictures: a PNG of theirs gets one as text chunks, its pixels untouched,
        unless it was asked for without.

        Raises:
            ValueError: the server called it a PNG and it is none.
        """
        if self.media_type != "image/png" or not self.plan.picture_record:
            return self.data
        if RECORD_KEY in png_text.read(self.data):
            return self.data
        texts = {
            PARAMETERS_KEY: parameters_line(self),
            RECORD_KEY: json.dumps(self.record(), ensure_ascii=False),
        }
        return png_text.insert(self.data, texts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `file_bytes()` to `path`, overwriting; never leaves half a file.

        Raises:
            OSError: the file cannot be written.
        """
        return write_file(Path(path), self.file_bytes())


def write_file(path: Path, data: bytes) -> Path:
    """Writes through a temporary file beside `path`, so that no reader sees half a file.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        # Not `path`'s own name with more around it, which might be longer than names may be.
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return path
