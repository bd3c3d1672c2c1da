"""The models of a ComfyUI folder: every Chroma that lies there, with the text encoder and autoencoder beside it.

Nothing is copied or renamed, and nothing but headers is read. Links are followed, as ComfyUI follows them: what is
found is fixed at the start, and a request names a model by its id, never by a path.

Of several text encoders or autoencoders one is taken for each transformer, by the same rule each time:

- it can be used, and a text encoder gives as many channels as the transformer takes;
- names of other models with the same shapes (`flan` of a text encoder, `sd3` of an autoencoder) come last;
- the largest as it is stored, which has lost least;
- the first by its path.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.domain.base_names import base_name_of, usual_defaults
from chromarpc_server.domain.models import (
    WEIGHT_SUFFIXES,
    LocalPart,
    ModelPart,
    ModelSpec,
)
from chromarpc_server.pipeline.weights.formats.refusals import GIVE
from chromarpc_server.runtime.part_facts import PartFacts, part_facts

TRANSFORMER_FOLDERS = ("diffusion_models", "unet", "checkpoints")
TEXT_ENCODER_FOLDERS = ("text_encoders", "clip")
AUTOENCODER_FOLDERS = ("vae",)
MAX_FILES = 20_000
"""That are looked at below one folder."""
MAX_DEPTH = 12
MAX_ID = 64
_OTHERS = {
    ModelPart.TEXT_ENCODER: re.compile("flan"),
    ModelPart.AUTOENCODER: re.compile("sd3|sd35|stable.?diffusion"),
}
"""Names of parts of other models that have the same shapes."""
_UNTELLABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes that are no UTF-8: no message can hold such a name, or no terminal should."""


@dataclass(frozen=True)
class SkippedFile:
    """A file of weights that is served as no model, or a folder that was not looked through."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ComfyuiFolder:
    """What was found."""

    models: tuple[ModelSpec, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()
    """Transformers and checkpoints that are something else, text encoders and autoencoders that are, and folders
    and links that cannot be followed."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    """Below the folder."""
    facts: PartFacts


def find_models(folder: Path, taken: Container[str] = ()) -> ComfyuiFolder:
    """Every Chroma below a ComfyUI folder, in the order of their files' paths.

    Args:
        folder: ComfyUI's `models`, or ComfyUI's own folder.
        taken: ids that other models have and keep.
    """
    if not _has_models(folder) and _has_models(folder / "models"):
        folder = folder / "models"
    unread: list[SkippedFile] = []
    if not _has_models(folder):
        unread.append(SkippedFile(folder, f"has none of the folders {', '.join(TRANSFORMER_FOLDERS)}"))
    transformers = list(_files(folder, TRANSFORMER_FOLDERS, ModelPart.TRANSFORMER, unread))
    beside = {
        ModelPart.TEXT_ENCODER: list(_files(folder, TEXT_ENCODER_FOLDERS, ModelPart.TEXT_ENCODER, unread)),
        ModelPart.AUTOENCODER: list(_files(folder, AUTOENCODER_FOLDERS, ModelPart.AUTOENCODER, unread)),
    }
    ids: set[str] = set()
    models: list[ModelSpec] = []
    for file in transformers:
        if not file.facts.problem:
            model_id = _free_id(file.name, ids, taken)
            ids.add(model_id)
            models.append(_model(model_id, file, beside))
    looked_at = (
        (transformers, GIVE["transformer"]),
        (beside[ModelPart.TEXT_ENCODER], GIVE["text_encoder"]),
        (beside[ModelPart.AUTOENCODER], GIVE["autoencoder"]),
    )
    skipped = [
        SkippedFile(file.path, file.facts.problem.removesuffix(f"; {advice}"))
        for files, advice in looked_at
        for file in files
        if file.facts.problem
    ]
    return ComfyuiFolder(tuple(models), (*skipped, *unread))


def _has_models(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in TRANSFORMER_FOLDERS)


def _model(model_id: str, file: _File, beside: Mapping[ModelPart, list[_File]]) -> ModelSpec:
    base_name = base_name_of(file.path.name)
    parts = {
        part: None if part in file.facts.holds else _chosen(part, files, file.facts.text_width)
        for part, files in beside.items()
    }
    return ModelSpec(
        id=model_id,
        description=f"{file.path.name}, of this server's ComfyUI folder",  # clients are told no folders
        transformer=LocalPart(file.path),
        text_encoder=parts[ModelPart.TEXT_ENCODER],
        autoencoder=parts[ModelPart.AUTOENCODER],
        base_name=base_name,
        defaults=usual_defaults(base_name),
    )


def _chosen(part: ModelPart, files: list[_File], text_width: int | None) -> LocalPart | None:
    """Which of several is taken; None where none can be."""
    fit = [
        file
        for file in files
        if not file.facts.problem
        and (part is not ModelPart.TEXT_ENCODER or text_width is None or file.facts.text_width == text_width)
    ]
    others = _OTHERS[part]
    fit.sort(key=lambda file: (bool(others.search(file.path.name.lower())), -file.facts.size_bytes, file.name))
    return LocalPart(fit[0].path) if fit else None


def _files(folder: Path, kinds: tuple[str, ...], part: ModelPart, unread: list[SkippedFile]) -> Iterator[_File]:
    """Files of weights below some of the folders, by path; each once, however many links lead to it."""
    seen: set[str] = set()
    for kind in kinds:
        for path in sorted(_below(folder / kind, unread)):
            name = path.relative_to(folder).as_posix()
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            if _UNTELLABLE.search(name):
                unread.append(SkippedFile(path, "its name has characters that no client can be told"))
            else:
                yield _File(path, name, part_facts(path, part))


def _below(folder: Path, unread: list[SkippedFile]) -> Iterator[Path]:
    """Every file of weights, through links to folders as well; a link that leads back is followed once.

    `unread` collects what cannot be followed.
    """
    visited: set[str] = set()
    waiting = [(folder, 0)]
    found = 0
    while waiting:
        at, depth = waiting.pop()
        real = os.path.realpath(at)
        if real in visited:
            continue
        visited.add(real)
        if depth > MAX_DEPTH:
            unread.append(SkippedFile(at, f"lies more than {MAX_DEPTH} folders deep"))
            continue
        for entry in _entries(at, unread):
            path = at / entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself, or through a folder that is not ours to read
                unread.append(SkippedFile(path, f"cannot be read: {error.strerror}"))
                continue
            if is_folder:
                waiting.append((path, depth + 1))
            elif path.suffix.lower() not in WEIGHT_SUFFIXES:
                continue
            elif is_file and found == MAX_FILES:
                unread.append(SkippedFile(folder, f"has more than {MAX_FILES} files of weights"))
                return
            elif is_file:
                found += 1
                yield path
            elif entry.is_symlink():
                unread.append(SkippedFile(path, "is a link to a file that is not there"))


def _entries(folder: Path, unread: list[SkippedFile]) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, but for what is hidden."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except FileNotFoundError:  # a ComfyUI folder need not have every kind
        return []
    except OSError as error:
        unread.append(SkippedFile(folder, f"cannot be read: {error.strerror}"))
        return []
    return sorted(entries, key=lambda entry: entry.name)


def _free_id(name: str, ids: Container[str], taken: Container[str]) -> str:
    """An id made of a file's name; with the folder's, and then with a number, where another model has it."""
    path = Path(name)
    stem = _as_id(path.stem)
    choices = [stem, _as_id(f"{path.parent.name}-{path.stem}")]
    for choice in choices:
        if choice not in ids and choice not in taken:
            return choice
    number = 2
    while (choice := f"{stem[: MAX_ID - 5]}-{number}") in ids or choice in taken:
        number += 1
    return choice


def _as_id(text: str) -> str:
    """Lower case without accents, and a hyphen for everything else that no id may have."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    return re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-._")[:MAX_ID] or "model"
