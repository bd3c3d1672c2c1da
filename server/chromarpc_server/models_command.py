"""`chromarpc-server models` and `fetch`: what models there are, what they lack, and how it comes here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from chromarpc_server.domain.models import REGISTRY, HubPart, ModelSpec, hub_part
from chromarpc_server.model_catalogue import Catalogue, catalogue
from chromarpc_server.runtime.comfyui_folder import SkippedFile
from chromarpc_server.runtime.model_files import FoundPart, ModelFiles, downloads, fetch, fetch_command
from chromarpc_server.settings import ServerSettings

EXIT_NONE = 1
EXIT_USAGE = 2


def list_models(settings: ServerSettings, *, as_json: bool, out: TextIO) -> int:
    """Writes every model with its parts. Returns 0 where one of them can be drawn with.

    Models that are built in count only where the settings bring none: one of them ships with the package.

    Raises:
        ValueError: a setting names a model that there is none of.
    """
    found = catalogue(settings)
    files = ModelFiles(settings.model_folder)
    own = [spec for spec in found.models.values() if REGISTRY.get(spec.id) != spec]
    built_in = [spec for spec in found.models.values() if REGISTRY.get(spec.id) == spec]
    brings_own = bool(own) or settings.comfyui is not None
    told = {spec.id: (spec, files.parts(spec)) for spec in (*own, *built_in)}
    complete = {model_id for model_id, (_, parts) in told.items() if all(map(_is_usable, parts))}
    if as_json:
        print(json.dumps(_as_json(told, complete, found), indent=2), file=out)
    else:
        for line in _lines(told, complete, found.skipped):
            print(line, file=out)
    wanted = own if brings_own else built_in
    return 0 if any(spec.id in complete for spec in wanted) else EXIT_NONE


def fetch_models(names: Sequence[str], settings: ServerSettings | None) -> int:
    """Downloads models, by name, or single parts, as `owner/name[:file]`. Returns the exit code.

    `settings`: where they name models of their own.
    """
    models = REGISTRY if settings is None else catalogue(settings).models
    wanted: list[HubPart] = []
    for name in names:
        spec, part = models.get(name), hub_part(name)
        if spec is not None:
            parts = _missing_downloads(spec, settings)
            if not downloads(spec) and not parts:
                print(f"chromarpc-server fetch: {name} has no part that is fetched from the hub", file=sys.stderr)
                return EXIT_USAGE
            wanted += parts
        elif part is not None:
            wanted.append(part)
        else:
            known = ", ".join(model for model in models if downloads(models[model]))
            print(
                f"chromarpc-server fetch: no such model: {name}; known are {known}; or give owner/name:file of "
                "the Hugging Face hub",
                file=sys.stderr,
            )
            return EXIT_USAGE
    try:
        fetch(list(dict.fromkeys(wanted)))
    except OSError as error:  # huggingface_hub's HTTP errors are OSErrors too
        print(f"chromarpc-server fetch: {error}", file=sys.stderr)
        print("Run the same command again to go on where it stopped.", file=sys.stderr)
        return EXIT_NONE
    for name in names:
        if name in models:
            is_built_in = REGISTRY.get(name) == models[name]  # else the flags that bring it are needed, too
            hint = f": start the server with `chromarpc-server --preload {name}`" if is_built_in else ""
            print(f"{name} is ready{hint}")
    return 0


def _missing_downloads(spec: ModelSpec, settings: ServerSettings | None) -> list[HubPart]:
    """What a model takes from the hub; of one that lies here, what it lacks."""
    folders = {} if settings is None else settings.model_folder
    lacking = [part.source for part in ModelFiles(folders).parts(spec) if not part.is_present]
    return list(dict.fromkeys([*downloads(spec), *(source for source in lacking if isinstance(source, HubPart))]))


def _is_usable(part: FoundPart) -> bool:
    return part.is_present and not part.problem


def _lines(
    told: Mapping[str, tuple[ModelSpec, tuple[FoundPart, ...]]], complete: set[str], skipped: Iterable[SkippedFile]
) -> Iterator[str]:
    for model_id, (spec, parts) in told.items():
        yield f"{model_id}  {'complete' if model_id in complete else 'incomplete'}"
        yield f"  {spec.description}"
        for part in parts:
            yield f"  {part.part.replace('_', ' '):12}  {_part_text(part)}"
        command = _command(spec, parts)
        if command:
            yield f"  fetch what is missing with: {command}"
    skipped = list(skipped)
    if skipped:
        yield ""
        yield "skipped:"
        for file in skipped:
            yield f"  {_shown(file.path)}: {file.reason}"


def _shown(path: Path) -> str:
    """A path for people, whatever is in it: line feeds, colours, bytes that are no UTF-8."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(path))


def _part_text(part: FoundPart) -> str:
    if part.path is None:
        return f"missing  {part.source}" + (f"  ({part.problem})" if part.problem else "")
    if part.problem:
        return f"cannot be used  {part.path}: {part.problem}"
    stored = f"{part.facts.stored_as}, {part.facts.size_bytes / 1e9:.2f} GB  " if part.facts.stored_as else ""
    return f"{stored}{part.path}"


def _command(spec: ModelSpec, parts: Sequence[FoundPart]) -> str:
    missing = [part.source for part in parts if not part.is_present]
    return fetch_command(spec, missing) if missing else ""


def _as_json(
    told: Mapping[str, tuple[ModelSpec, tuple[FoundPart, ...]]], complete: set[str], found: Catalogue
) -> dict[str, Any]:
    return {
        "models": [
            {
                "id": model_id,
                "description": spec.description,
                "complete": model_id in complete,
                "base_name": spec.base_name,
                "defaults": asdict(spec.defaults),
                "parts": [
                    {
                        "part": part.part,
                        "source": str(part.source),
                        "path": None if part.path is None else str(part.path),
                        "present": part.is_present,
                        "stored_as": part.facts.stored_as,
                        "size_bytes": part.facts.size_bytes,
                        "problem": part.problem,
                    }
                    for part in parts
                ],
                "fetch_command": _command(spec, parts),
            }
            for model_id, (spec, parts) in told.items()
        ],
        "skipped": [{"path": str(file.path), "reason": file.reason} for file in found.skipped],
    }
