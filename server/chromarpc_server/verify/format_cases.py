"""`formats`: checkpoints in every layout that people have, what their weights are, and files to refuse.

`index.json` says of each file which part of a model it is, which recorded float32 weights it holds, and how far
off they may be. Everything that lies there has to be named by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.stored_transformer import open_transformer
from chromarpc_server.pipeline.progress import SILENT
from chromarpc_server.pipeline.weights.formats.prefixes import Part
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.other_parts import open_autoencoder, open_text_encoder
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.reading import open_weights, read_json
from chromarpc_server.pipeline.weights.shared import WeightFiles
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance

GROUP = "formats"
INDEX = "index.json"
PARTS: Mapping[str, Part] = {"transformer": "transformer", "text_encoder": "text_encoder", "vae": "autoencoder"}
"""By the index's names."""
CONFIGS: Mapping[Part, str] = {"text_encoder": "t5_config.json", "autoencoder": "vae_config.json"}
"""What says the sizes of a folder's parts, besides the parts."""
_REFUSE = "refuse"


class _Misunderstood(Exception):
    """The index says something that is not understood, or names a file that is not there."""


@dataclass(frozen=True)
class _Held:
    """A part that a file holds."""

    part: StoredPart
    config: Mapping[str, object]
    left_out: str


def find_formats_folder(directory: Path) -> Path | None:
    """The folder of formats: below a folder that is laid out like tests/goldens, or the folder itself."""
    if (directory / GROUP).is_dir():
        return directory / GROUP
    itself = directory.resolve().name == GROUP or _has_index(directory)
    return directory if itself else None


def _has_index(directory: Path) -> bool:
    """Whether there is an index of formats, or one that cannot be read."""
    if not (directory / INDEX).is_file():
        return False
    try:
        return "files" in read_json(directory / INDEX)
    except WeightsInvalid:
        return True


def run(folder: Path, reporter: Reporter) -> None:
    """Every file of the folder."""
    try:
        index = read_json(folder / INDEX)
    except WeightsInvalid as error:
        reporter.add(Result(f"{GROUP}/{INDEX}", Outcome.FAIL, note=error.message))
        return
    files, refused = index.get("files"), index.get("refuse", {})
    if not isinstance(files, dict) or not isinstance(refused, dict):
        reporter.add(Result(f"{GROUP}/{INDEX}", Outcome.FAIL, note="it names no files"))
        return
    for name, entry in files.items():
        case = f"{GROUP}/{name}"
        reporter.guarded(case, partial(_file, case, folder, name, entry, reporter))
    for name, reason in refused.items():
        case = f"{GROUP}/{_REFUSE}/{name}"
        reporter.guarded(case, partial(_refused, case, folder, name, reason, reporter))
    for path in _unknown(folder, files, refused):
        reporter.add(Result(f"{GROUP}/{path}", Outcome.FAIL, note=f"{INDEX} does not say what it is"))


def _inside(folder: Path, name: object) -> Path:
    """A file or folder that the index names."""
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _Misunderstood(f"{INDEX} names {name!r}")
    if not (folder / name).exists():
        raise _Misunderstood(f"{name} is not there")
    return folder / name


def _unknown(folder: Path, files: Mapping[str, Any], refused: Mapping[str, object]) -> Iterator[str]:
    """What lies in the folder and the index does not name."""
    named = {INDEX, "README.md", *CONFIGS.values(), *files, *(f"{_REFUSE}/{name}" for name in refused)}
    for entry in files.values():
        if isinstance(entry, dict):
            also = entry.get("also")
            named |= {str(entry.get("expected")), *(map(str, also.values()) if isinstance(also, dict) else ())}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(str(PurePosixPath(one)) in named for one in (name, *name.parents)):
            yield str(PurePosixPath(name))


def _file(case: str, folder: Path, name: str, entry: object, reporter: Reporter) -> None:
    path = _inside(folder, name)
    if not isinstance(entry, dict):
        raise _Misunderstood(f"{INDEX} says {entry!r} of it")
    wanted = {entry.get("part"): entry.get("expected"), **entry.get("also", {})}
    tolerance = float(entry.get("rel", 0.0))
    for position, (part, expected) in enumerate(wanted.items()):
        if part not in PARTS:
            raise _Misunderstood(f"{INDEX} says that it is a {part!r}")
        each = case if position == 0 else f"{case}/{part}"
        recorded = _inside(folder, expected)
        reporter.guarded(each, partial(_compared, each, path, PARTS[part], recorded, tolerance, reporter))


def _compared(case: str, path: Path, part: Part, recorded: Path, tolerance: float, reporter: Reporter) -> None:
    """Every tensor of a part beside the recorded one."""
    held = _part(path, part)
    differing = _other_sizes(held.config, path, part)
    if differing:
        reporter.add(Result(case, Outcome.FAIL, note=differing))
        return
    expected = dict(open_weights(recorded).read())
    found = set(held.part.recipes)
    if found != set(expected):
        surplus, missing = sorted(found - set(expected)), sorted(set(expected) - found)
        note = f"missing {missing[:3]}, not expected {surplus[:3]}"
        reporter.add(Result(case, Outcome.FAIL, note=note))
        return
    largest, furthest, worst = 0.0, 0.0, ""
    for name, stored in ReadingProgress((held.part,), SILENT).stored(held.part).items():
        rel, max_abs = distance(stored.dense().float(), expected[name])
        furthest = max(furthest, max_abs)
        if rel > largest:
            largest, worst = rel, name
    outcome = Outcome.PASS if largest <= tolerance else Outcome.FAIL
    note = f"{len(expected)} tensors" + (f", worst {worst}" if worst else "")
    reporter.add(Result(case, outcome, largest, furthest, f"rel {tolerance:g}", note))


def _refused(case: str, folder: Path, name: str, why: object, reporter: Reporter) -> None:
    """Whatever part it is given as, the file is refused; or what it has too many of is left out, and said."""
    path = _inside(folder, f"{_REFUSE}/{name}")
    told: dict[Part, str] = {}
    for part in PARTS.values():
        try:
            left_out = _part(path, part).left_out
        except WeightsInvalid as error:
            told[part] = error.message
            continue
        if not left_out:
            reporter.add(Result(case, Outcome.FAIL, note=f"was accepted as {part}, and should be refused: {why}"))
            return
        told[part] = f"accepted without {left_out}"
    part = "text_encoder" if str(why).startswith("text encoder") else "transformer"
    outcome = Outcome.PASS if all(told.values()) else Outcome.FAIL
    reporter.add(Result(case, outcome, note=told[part] or "refused without a reason"))


def _part(path: Path, part: Part) -> _Held:
    """A part as a server has it that is given this file.

    Raises:
        WeightsInvalid: it is something else, or damaged.
    """
    files = WeightFiles()
    match part:
        case "transformer":
            return _Held(open_transformer(path, files).part, {}, "")
        case "text_encoder":
            encoder = open_text_encoder(path, files)
            return _Held(encoder.part, encoder.config, encoder.left_out)
        case "autoencoder":
            autoencoder = open_autoencoder(path, files)
            return _Held(autoencoder.part, autoencoder.config, "")


def _other_sizes(config: Mapping[str, object], path: Path, part: Part) -> str:
    """How sizes that were read off the tensors differ from those that lie beside; empty where they agree."""
    beside = path.parent / CONFIGS.get(part, INDEX)
    if part not in CONFIGS or not beside.is_file():
        return ""
    said = read_json(beside)
    return "; ".join(
        f"{key} is {config[key]!r}, should be {said[key]!r}"
        for key in config
        if key in said and said[key] != config[key]
    )
