"""A workflow's files among what a server has: its model, and its adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from chromarpc.comfyui.model_line import Adapter, ModelFile
from chromarpc.comfyui.problems import Findings, Unmapped, cut
from chromarpc.loras import LoraList, LoraSource, StoredLora
from chromarpc.request import Lora
from chromarpc.v1 import model_service_pb2

TRANSFORMER: Final = "transformer"
_MAX_LISTED: Final = 20


@dataclass(frozen=True)
class ServedModel:
    """The model that a request names, and what of it counts for a workflow."""

    id: str
    message: model_service_pb2.Model | None
    """None where the server was not asked, or does not have it."""


def find_model(
    file: ModelFile, models: Sequence[model_service_pb2.Model] | None, chosen: str | None
) -> ServedModel:
    """The model that a workflow's file is on this server.

    Args:
        file: where the workflow loads it.
        models: the server's; None where it was not asked.
        chosen: id that the caller gives in its place.

    Raises:
        Unmapped: no model of the server has that file, or several have.
    """
    if chosen is not None:
        return ServedModel(chosen, next((model for model in models or () if model.id == chosen), None))
    if models is None:
        raise Unmapped(file.problem(f"give the model that {cut(file.name)} is on the server"))
    name = base_name(file.name)
    found = _best([model for model in models if _holds(model, name)])
    if not found:
        ids = _listed([model.id for model in models])
        raise Unmapped(
            file.problem(f"no model of this server has the file {cut(name)}: give one of its models: {ids}")
        )
    if len(found) > 1:
        ids = _listed([model.id for model in found])
        raise Unmapped(file.problem(f"several models have a file {cut(name)}: give one of {ids}"))
    return ServedModel(found[0].id, found[0])


def part_source(model: model_service_pb2.Model, name: str) -> str:
    """Where one of a model's parts comes from; empty where the server does not say."""
    return next((part.source for part in model.parts if part.part == name), "")


def stored_as(model: model_service_pb2.Model) -> str:
    """How the transformer's weights are stored; empty where the server does not say."""
    return next((part.stored_as for part in model.parts if part.part == TRANSFORMER), "")


def find_loras(
    adapters: Iterable[Adapter], loras: LoraList | Iterable[StoredLora] | None, found: Findings
) -> list[Lora]:
    """A workflow's adapters as this server has them; those that it has not are problems.

    Args:
        adapters: the workflow's.
        loras: the server's; None where it was not asked, and names are taken as they are.
        found: collects problems, and a remark where another folder's file is taken.
    """
    stored = None if loras is None else list(loras)
    may_have_more = isinstance(loras, LoraList) and loras.truncated
    named: list[Lora] = []
    for adapter in adapters:
        path = adapter.name.replace("\\", "/")
        if "://" in path:  # a stranger's workflow shall have no server fetch anything
            found.refuse(
                adapter.problem("is an address, which no workflow may have fetched: give it as an adapter")
            )
            continue
        if stored is not None:
            matched = found.attempt(_find_lora, adapter, path, stored, found, may_have_more=may_have_more)
            if matched is None:
                continue
            path = matched
        named.append(Lora(path, adapter.multiplier))
    return named


def base_name(path: str) -> str:
    """The name of a file without its folders, whichever way they are written."""
    return re.split(r"[/\\]", path)[-1]


def file_of(source: str) -> str:
    """The name of the file that a part comes from: `owner/name:file`, `bundled:folder/file`, or just a file."""
    return base_name(source.rpartition(":")[2])


def _holds(model: model_service_pb2.Model, name: str) -> bool:
    source = part_source(model, TRANSFORMER)
    return bool(source) and file_of(source).casefold() == name.casefold()


def _best(models: list[model_service_pb2.Model]) -> list[model_service_pb2.Model]:
    """Those that are served as themselves, where any is; of these those whose weights are there."""
    for is_better in (lambda model: not model.alias_of, lambda model: model.weights_present):
        models = [model for model in models if is_better(model)] or models
    return models


def _find_lora(
    adapter: Adapter, path: str, stored: list[StoredLora], found: Findings, *, may_have_more: bool
) -> str:
    if any(lora.path == path for lora in stored):
        return path
    # The server's folder may be one above ComfyUI's, or one below it, or on a system that tells no case.
    ending = f"/{path}".casefold()
    candidates = [lora for lora in stored if f"/{lora.path}".casefold().endswith(ending)]
    name = base_name(path).casefold()
    candidates = candidates or [lora for lora in stored if base_name(lora.path).casefold() == name]
    candidates = candidates or [
        lora for lora in stored if lora.source is LoraSource.UPLOAD and lora.filename.casefold() == name
    ]
    if len(candidates) == 1:
        found.remark(f"{adapter.node.label}, {adapter.input}: {cut(path)} is {candidates[0].path} on this server")
        return candidates[0].path
    if candidates:
        paths = _listed([lora.path for lora in candidates])
        raise Unmapped(adapter.problem(f"several adapters of this server are called {cut(path)}: {paths}"))
    if may_have_more:  # it lists no more, and may have it all the same
        return path
    raise Unmapped(
        adapter.problem(
            f"this server has no adapter {cut(path)}: put it below its --lora-root, or `chromarpc lora upload` it"
        )
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
