"""Where the parts of each model lie on this machine, and how to fetch those that do not.

A part lies where the model's entry says: at a path, bundled with the package, or in the Hugging Face cache; the
settings may name a folder for a whole model instead. A part that the entry leaves open is looked for in the folder
that was given for the transformer, then inside its file; else it is that of `chroma`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import huggingface_hub

from chromarpc_server.domain.errors import WeightsInvalid, WeightsMissing
from chromarpc_server.domain.models import (
    CHROMA,
    REGISTRY,
    STANDARD_AUTOENCODER,
    STANDARD_TEXT_ENCODER,
    T5_TOKENIZER,
    WEIGHT_SUFFIXES,
    BundledPart,
    HubPart,
    LocalPart,
    ModelPart,
    ModelSpec,
    PartSource,
    tokenizer_for,
)
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.pipeline.weights.reading import is_single, shard_paths, tokenizer_file
from chromarpc_server.runtime.part_facts import PartFacts, part_facts

_FOLDERS: Mapping[ModelPart, tuple[str, ...]] = {
    ModelPart.TRANSFORMER: ("transformer",),
    ModelPart.TEXT_ENCODER: ("text_encoder_2", "text_encoder"),
    ModelPart.TOKENIZER: ("tokenizer_2", "tokenizer"),
    ModelPart.AUTOENCODER: ("vae",),
}
"""Where parts lie in the folder of a whole model: as the trainer's extras have it, then as diffusers has it."""
_STANDARD: Mapping[ModelPart, PartSource] = {
    ModelPart.TRANSFORMER: CHROMA.transformer,
    ModelPart.TEXT_ENCODER: STANDARD_TEXT_ENCODER,
    ModelPart.TOKENIZER: T5_TOKENIZER,
    ModelPart.AUTOENCODER: STANDARD_AUTOENCODER,
}
"""Of a model that leaves a part open."""
_Place = tuple[PartSource, Path | None]
"""Where a part comes from, and lies; None where it does not."""
_MARKS = ("config.json", "tokenizer.json", "spiece.model", "model.safetensors.index.json")
"""A file that a folder of the hub has, whichever part it is."""


@dataclass(frozen=True)
class FoundPart:
    """A part of a model, as it is on this machine."""

    part: ModelPart
    source: PartSource
    path: Path | None
    """Where it lies; None where it does not."""
    facts: PartFacts = PartFacts()

    @property
    def is_present(self) -> bool:
        """Whether it is on this machine."""
        return self.path is not None

    @property
    def problem(self) -> str:
        """Why it cannot be used, where it is there and cannot."""
        return self.facts.problem


def fetch_command(spec: ModelSpec, missing: Iterable[PartSource] | None = None) -> str:
    """The command that makes what is missing of a model present; empty where none can.

    `missing`: what is; by default every part that can be fetched.
    """
    wanted = [
        source for source in (downloads(spec) if missing is None else missing) if isinstance(source, HubPart)
    ]
    if not wanted:
        return ""
    if REGISTRY.get(spec.id) == spec:
        return f"chromarpc-server fetch {spec.id}"
    return f"chromarpc-server fetch {' '.join(map(str, dict.fromkeys(wanted)))}"


def downloads(spec: ModelSpec) -> list[HubPart]:
    """What is to be fetched for a model, whether it was already or not."""
    text_encoder, autoencoder = spec.text_encoder, spec.autoencoder
    if isinstance(spec.transformer, HubPart):
        text_encoder, autoencoder = text_encoder or STANDARD_TEXT_ENCODER, autoencoder or STANDARD_AUTOENCODER
    sources = (spec.transformer, text_encoder, spec.tokenizer, autoencoder)
    return [source for source in sources if isinstance(source, HubPart)]


class ModelFiles:
    """Finds models' files. Safe to call from any thread; touches the disk, so not from the event loop."""

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        """`folders`: model id to a folder with the transformer file, text_encoder_2/, tokenizer_2/, vae/."""
        self._folders = dict(folders or {})

    def find(self, spec: ModelSpec) -> CheckpointFiles | None:
        """The model's files, or None where one of them is not on this machine."""
        try:
            files = self._files(spec, self._located(spec))
            return None if files is None or files.missing() else files
        except OSError:  # a disk that went away, or a folder that is not ours to read
            return None

    def require(self, spec: ModelSpec) -> CheckpointFiles:
        """The model's files.

        Raises:
            WeightsMissing: naming the parts, and the command that fetches them.
        """
        found = self.find(spec)
        if found is not None:
            return found
        missing = [part for part in self.parts(spec) if not part.is_present]
        command = fetch_command(spec, [part.source for part in missing])
        named = " and ".join(map(_named, missing)) or "a part of it"
        verb = "are" if len(missing) > 1 else "is"
        raise WeightsMissing(
            f"the weights of {spec.id} are not on this server: {named} {verb} missing; "
            f"{_remedy(command, missing)}",
            field="model",
            metadata={
                "model": spec.id,
                "command": command,
                "parts": ",".join(part.part for part in missing),
            },
        )

    def parts(self, spec: ModelSpec) -> tuple[FoundPart, ...]:
        """The model's parts as they are here, with what their headers say. Reads the headers that are new."""
        located = self._located(spec)
        found = {part: _found(part, source, path) for part, (source, path) in located.items()}
        encoder, width = found[ModelPart.TEXT_ENCODER], found[ModelPart.TRANSFORMER].facts.text_width
        if not encoder.problem and None not in (width, theirs := encoder.facts.text_width) and width != theirs:
            facts = replace(
                encoder.facts, problem=f"gives {theirs} channels of text, and the transformer takes {width}"
            )
            found[ModelPart.TEXT_ENCODER] = replace(encoder, facts=facts)
        tokenizer, rows = found[ModelPart.TOKENIZER], encoder.facts.vocabulary
        if tokenizer.path is None and tokenizer.source is T5_TOKENIZER and rows is not None:
            problem = f"none is known for a text encoder of {rows} pieces: give one"
            found[ModelPart.TOKENIZER] = replace(tokenizer, facts=PartFacts(problem=problem))
        return tuple(found.values())

    def state(self, spec: ModelSpec) -> str:
        """Whether the model can be drawn with, in a few words for people."""
        parts = self.parts(spec)
        problem = next(
            (f"{_spoken(part.part)}: {part.problem}" for part in parts if part.path and part.problem), ""
        )
        if problem:
            return f"cannot be used: {problem}"
        if self.find(spec) is not None:
            return "ready"
        missing = [part for part in parts if not part.is_present]
        command = fetch_command(spec, [part.source for part in missing])
        return f"weights missing: {command or _remedy(command, missing)}"

    def _located(self, spec: ModelSpec) -> dict[ModelPart, _Place]:
        """Where each part comes from, and lies if it is here. What cannot be looked at is not here."""
        try:
            return self._looked_for(spec)
        except OSError:
            sources = {part: spec.source(part) or _STANDARD[part] for part in ModelPart}
            return {
                part: (source, _path(source) if isinstance(source, BundledPart) else None)
                for part, source in sources.items()
            }

    def _looked_for(self, spec: ModelSpec) -> dict[ModelPart, _Place]:
        folder = self._folders.get(spec.id)
        if folder is not None:
            # What is not there is told by where it can be fetched from.
            return {
                part: (LocalPart(path), path) if path.exists() else (spec.source(part) or LocalPart(path), None)
                for part, path in _in_folder(folder, spec).items()
            }
        transformer = _path(spec.transformer)
        beside: Path | None = None
        if transformer is not None and transformer.is_dir():
            beside, transformer = transformer, _transformer_in(transformer)
        found: dict[ModelPart, _Place] = {ModelPart.TRANSFORMER: (spec.transformer, transformer)}
        inside = self._inside(spec, transformer)
        for part in (ModelPart.TEXT_ENCODER, ModelPart.AUTOENCODER):
            source = spec.source(part)
            if source is None and (there := _beside(beside, part)) is not None:
                source = LocalPart(there)
            if source is None and transformer is not None and part in inside:
                source = LocalPart(transformer) if isinstance(spec.transformer, LocalPart) else spec.transformer
                found[part] = (source, transformer)
                continue
            source = source or _STANDARD[part]
            found[part] = (source, _path(source))
        found[ModelPart.TOKENIZER] = _tokenizer(spec, beside, found[ModelPart.TEXT_ENCODER][1])
        return {part: found[part] for part in ModelPart}

    def _inside(self, spec: ModelSpec, transformer: Path | None) -> frozenset[ModelPart]:
        """Which parts the transformer's file holds besides; looked at only where that matters."""
        if transformer is None or (spec.text_encoder is not None and spec.autoencoder is not None):
            return frozenset()
        return part_facts(transformer, ModelPart.TRANSFORMER).holds

    def _files(self, spec: ModelSpec, located: Mapping[ModelPart, _Place]) -> CheckpointFiles | None:
        paths = {part: path for part, (_, path) in located.items()}
        transformer, text_encoder = paths[ModelPart.TRANSFORMER], paths[ModelPart.TEXT_ENCODER]
        tokenizer, vae = paths[ModelPart.TOKENIZER], paths[ModelPart.AUTOENCODER]
        if transformer is None or text_encoder is None or tokenizer is None or vae is None:
            return None
        preview = transformer.parent / "latent_preview.json"
        return CheckpointFiles(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            preview=preview if preview.is_file() else None,
            base_name=spec.base_name,
        )


class ModelFilesElsewhere(ModelFiles):
    """Where the hosts of a cluster have models. Whether they do shows there, so every model counts as present."""

    def find(self, spec: ModelSpec) -> CheckpointFiles:
        """The files as they would lie here."""
        folder = self._folders.get(spec.id, Path(spec.id))
        paths = _in_folder(folder, spec)
        return super().find(spec) or CheckpointFiles(
            transformer=paths[ModelPart.TRANSFORMER],
            text_encoder=paths[ModelPart.TEXT_ENCODER],
            tokenizer=paths[ModelPart.TOKENIZER],
            vae=paths[ModelPart.AUTOENCODER],
            base_name=spec.base_name,
        )

    def parts(self, spec: ModelSpec) -> tuple[FoundPart, ...]:
        """What is known here of parts that lie on hosts."""
        here = super().parts(spec)
        return tuple(
            found if found.is_present else FoundPart(found.part, found.source, Path(str(found.source)))
            for found in here
        )

    def state(self, spec: ModelSpec) -> str:  # noqa: ARG002 - hosts say it themselves
        """Nothing is missing here."""
        return "ready"


def _found(part: ModelPart, source: PartSource, path: Path | None) -> FoundPart:
    if path is None:
        return FoundPart(part, source, None)
    lacking = _lacking(part, path)
    if lacking:
        return FoundPart(part, source, None, PartFacts(problem=f"{path.name} is incomplete: {lacking} is missing"))
    return FoundPart(part, source, path, part_facts(path, part))


def _lacking(part: ModelPart, path: Path) -> str:
    """Name of a file that a part lacks; empty where it has all."""
    if part is ModelPart.TOKENIZER:
        wanted = [tokenizer_file(path)]
    else:
        try:
            wanted = [*shard_paths(path)]
        except WeightsInvalid:
            return "every file of weights"
        except OSError:  # which the part's facts tell
            return ""
        if part is not ModelPart.TRANSFORMER and not is_single(path):
            wanted.append(path / "config.json")
    return next((file.name for file in wanted if not file.is_file()), "")


def fetch(parts: Sequence[HubPart], *, token: str | None = None) -> None:
    """Downloads parts of models into the Hugging Face cache, resuming what an earlier try left.

    Shows huggingface_hub's own progress bars on standard error.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, OSError: what the download ended with.
    """
    for part in parts:
        if part.is_file:
            huggingface_hub.hf_hub_download(part.repo, part.path, token=token)
            continue
        patterns = [f"{part.path}/*"] if part.path else ["*.json", "*.safetensors", "*.model"]
        huggingface_hub.snapshot_download(part.repo, allow_patterns=patterns, token=token)


def _path(source: PartSource) -> Path | None:
    """Where a part lies; None where it is not here."""
    match source:
        case LocalPart(path=path):
            return _if_there(path)
        case BundledPart(path=name):
            return _if_there(Path(str(resources.files("chromarpc_server"))) / "assets" / name)
        case HubPart():
            return _in_hub_cache(source)


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _in_hub_cache(part: HubPart) -> Path | None:
    if part.is_file:
        found = huggingface_hub.try_to_load_from_cache(part.repo, part.path)
        return Path(found) if isinstance(found, str) else None
    for mark in _MARKS:
        inside = f"{part.path}/{mark}" if part.path else mark
        found = huggingface_hub.try_to_load_from_cache(part.repo, inside)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _in_folder(folder: Path, spec: ModelSpec) -> dict[ModelPart, Path]:
    """A model's parts where one folder was named for all of it."""
    match spec.transformer:
        case LocalPart(path=path):
            name = path.name
        case HubPart(path=inside) | BundledPart(path=inside):
            name = inside.rpartition("/")[2]
    return {
        ModelPart.TRANSFORMER: folder / name,
        ModelPart.TEXT_ENCODER: folder / "text_encoder_2",
        ModelPart.TOKENIZER: folder / "tokenizer_2",
        ModelPart.AUTOENCODER: folder / "vae",
    }


def _transformer_in(folder: Path) -> Path:
    """The transformer of a folder: its own folder below, the folder itself, or the one file of weights in it."""
    below = folder / "transformer"
    if below.is_dir():
        return below
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors.index.json")):
        return folder
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in WEIGHT_SUFFIXES)
    return files[0] if len(files) == 1 else folder


def _beside(folder: Path | None, part: ModelPart) -> Path | None:
    """A part in the folder of a whole model."""
    if folder is None:
        return None
    return next((folder / name for name in _FOLDERS[part] if (folder / name).is_dir()), None)


def _tokenizer(spec: ModelSpec, beside: Path | None, text_encoder: Path | None) -> _Place:
    """Where the tokenizer comes from, and lies."""
    if spec.tokenizer is not None:
        return spec.tokenizer, _path(spec.tokenizer)
    own = [_beside(beside, ModelPart.TOKENIZER)]
    if text_encoder is not None and text_encoder.is_dir():
        own += [text_encoder, _beside(text_encoder.parent, ModelPart.TOKENIZER)]
    for folder in own:
        if folder is not None and tokenizer_file(folder).is_file():
            return LocalPart(folder), folder
    rows = None if text_encoder is None else part_facts(text_encoder, ModelPart.TEXT_ENCODER).vocabulary
    found = T5_TOKENIZER if rows is None else tokenizer_for(rows)
    return (T5_TOKENIZER, None) if found is None else (found, _path(found))


def _spoken(part: ModelPart) -> str:
    return part.replace("_", " ")


def _named(part: FoundPart) -> str:
    why = f": {part.problem}" if part.problem else ""
    return f"its {_spoken(part.part)} ({part.source}{why})"


def _remedy(command: str, missing: Sequence[FoundPart]) -> str:
    if command:
        return f"fetch them there with: {command}"
    if any(isinstance(part.source, BundledPart) and not part.problem for part in missing):
        return "its package is incomplete: reinstall it"
    return "put the file where the settings name it"
