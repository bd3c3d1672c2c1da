"""Where pictures go, decided before anything is sent: a wrong path must not cost a generation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from chromarpc.cli.exits import UsageError
from chromarpc.events import ImageFormat

FORMATS_BY_SUFFIX: dict[str, ImageFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
_SUFFIXES_BY_MEDIA_TYPE = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@dataclass(frozen=True)
class ImageFiles:
    """The files of one generation's images."""

    template: Path
    """Its name may hold `{index}` and `{seed}`."""
    count: int

    def path(self, index: int, seed: int) -> Path:
        """The file of one image; never the same for two of one generation."""
        name = self.template.name
        if self.count > 1 and "{index}" not in name:
            name = f"{self.template.stem}-{{index}}{self.template.suffix}"
        return self.template.with_name(name.replace("{index}", f"{index}").replace("{seed}", f"{seed}"))


def image_files(
    output: Path | None, image_format: ImageFormat | None, count: int
) -> tuple[ImageFiles, ImageFormat]:
    """Where `count` images go and in what format, from `-o` and `--format`, either of which may be left out.

    Raises:
        UsageError: they contradict each other, or nothing can be written there.
    """
    is_trainers = image_format == "jpeg-trainer"
    named: ImageFormat | None = "jpeg" if is_trainers else image_format
    if output is None:
        output = Path("out.jpg" if named == "jpeg" else f"out.{named or 'png'}")
    meant = FORMATS_BY_SUFFIX.get(output.suffix.lower())
    if meant is None:
        raise UsageError(f"{output}: name a file that ends in {', '.join(FORMATS_BY_SUFFIX)}")
    if named is not None and named != meant:
        raise UsageError(f"{output}: the name says {meant} and the request says {image_format}")
    files = ImageFiles(output, count)
    _check_writable(output.parent)
    if files.path(0, 0).is_dir():
        raise UsageError(f"{output}: is a folder")
    return files, "jpeg-trainer" if is_trainers else meant


def preview_folder(folder: Path) -> Path:
    """The folder of previews, made if need be.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}") from None
    _check_writable(folder)
    return folder


def preview_name(prompt_index: int, step: int, media_type: str) -> str:
    """The file name of one preview; sorts by image and step."""
    return f"preview-{prompt_index}-{step:03d}{_SUFFIXES_BY_MEDIA_TYPE.get(media_type, '.bin')}"


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}: cannot be written")
