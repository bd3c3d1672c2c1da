"""A server's own models: the built-in ones, those of its settings, and those of a ComfyUI folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from chromarpc_server.domain.models import REGISTRY, ModelSpec
from chromarpc_server.runtime.comfyui_folder import ComfyuiFolder, SkippedFile, find_models
from chromarpc_server.settings import ServerSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalogue:
    """What a server serves, and what lies in its ComfyUI folder besides."""

    models: Mapping[str, ModelSpec]
    skipped: tuple[SkippedFile, ...] = ()


def catalogue(settings: ServerSettings) -> Catalogue:
    """The models by id, in the order in which they are listed. Reads headers of files; raises for settings.

    A model of the settings or of the folder takes the place of a built-in one with its id; one of the folder gets
    another id than one of the settings.

    Raises:
        ValueError: a setting names a model that there is none of.
    """
    configured = settings.configured_models()
    found = ComfyuiFolder() if settings.comfyui is None else find_models(settings.comfyui, configured)
    models = {**REGISTRY, **configured, **{spec.id: spec for spec in found.models}}
    settings.require_models(models)
    return Catalogue(models, found.skipped)


def served_models(settings: ServerSettings) -> Mapping[str, ModelSpec]:
    """The same, with a line in the log for what is not as it is built in.

    Raises:
        ValueError: a setting names a model that there is none of.
    """
    found = catalogue(settings)
    for spec in found.models.values():
        if spec.id in REGISTRY and spec != REGISTRY[spec.id]:
            log.info("model.replaced", extra={"model": spec.id, "source": str(spec.transformer)})
    if settings.comfyui is not None:
        added = [spec.id for spec in found.models.values() if spec != REGISTRY.get(spec.id)]
        is_any = bool(set(added) - {*settings.models, *settings.model})
        log.log(
            logging.INFO if is_any else logging.WARNING,
            "models.found",
            extra={"folder": settings.comfyui.name, "models": ",".join(added), "skipped": len(found.skipped)},
        )
    return found.models
