"""A picture's file, opened: its bytes, what it says of itself, and what is known of how it was drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from chromarpc.pictures.a1111 import parameters_facts
from chromarpc.pictures.comfyui import comfyui_facts
from chromarpc.pictures.facts import Fact, PictureFacts
from chromarpc.pictures.files import (
    MAX_FILE_BYTES,
    PARAMETERS_KEY,
    RECORD_KEY,
    NoPicture,
    PictureFile,
    read_picture,
)
from chromarpc.pictures.recorded import Unreadable, recorded_facts
from chromarpc.pictures.training_sample import NoSample, sample_facts


@dataclass(frozen=True)
class OpenedPicture:
    """One picture, and what is known of it."""

    path: Path
    data: bytes = field(repr=False)
    file: PictureFile
    facts: PictureFacts


def open_picture(path: Path, *, run_folder: Path | None = None) -> OpenedPicture:
    """Reads a picture.

    Args:
        path: of the file.
        run_folder: a training run's folder, which tells of its samples.

    Raises:
        NoPicture: it cannot be read; a sentence for people that names no file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NoPicture(f"cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise NoPicture(f"has more than {MAX_FILE_BYTES} bytes")
    said = read_picture(data)
    return OpenedPicture(path, data, said, _sized(_facts(said, path, run_folder), said))


def _facts(said: PictureFile, path: Path, run_folder: Path | None) -> PictureFacts:
    texts = said.texts
    broken: tuple[str, ...] = ()
    if RECORD_KEY in texts:
        try:
            return recorded_facts(texts[RECORD_KEY])
        except Unreadable as error:
            broken = (f"{error}",)
    found = comfyui_facts(texts)
    if found is None and PARAMETERS_KEY in texts:
        found = parameters_facts(texts[PARAMETERS_KEY])
    if found is not None:
        return replace(found, remarks=(*broken, *found.remarks))
    if run_folder is not None:
        try:
            return sample_facts(run_folder, path)
        except NoSample as error:
            broken = (*broken, f"{error}")
    return PictureFacts(program="", facts={}, remarks=(*broken, "it does not say what it was drawn with"))


def _sized(found: PictureFacts, said: PictureFile) -> PictureFacts:
    """The size that was drawn is the file's, unless both are told and differ."""
    sides = {"width": said.width, "height": said.height}
    facts, remarks = dict(found.facts), list(found.remarks)
    if found.program and not found.is_ours:
        facts.setdefault("output.format", Fact(said.kind.lower()))
    for name, pixels in sides.items():
        told = facts.get(name)
        if told is None or told.value is None:
            facts[name] = Fact(pixels, "the file's")
        elif told.value != pixels:
            remarks.append(f"the file's {name} is {pixels}, and it says {told.shown}: it was resized, or floored")
            if not found.is_ours:
                facts[name] = Fact(pixels, f"the file's; {told.shown} was asked for")
    return replace(found, facts=facts, remarks=tuple(remarks))
