"""Where each model's files lie on this machine, and how to fetch those that do not.

A model is looked for, in this order: in the folder that the settings name for it; bundled with the package;
in the Hugging Face cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import huggingface_hub

from chromarpc_server.domain.errors import WeightsMissing
from chromarpc_server.domain.models import BundledSource, HubSource, ModelSpec
from chromarpc_server.pipeline import CheckpointFiles

_EXTRAS_PATTERNS = ("text_encoder_2/*", "tokenizer_2/*", "vae/*")


def fetch_command(spec: ModelSpec) -> str:
    """The command that makes the model's weights present; empty for a bundled model."""
    return f"chromarpc-server fetch {spec.id}" if isinstance(spec.source, HubSource) else ""


class ModelFiles:
    """Finds models' files. Safe to call from any thread; touches the disk, so not from the event loop."""

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        """`folders`: model id to a folder with the transformer file, text_encoder_2/, tokenizer_2/, vae/."""
        self._folders = dict(folders or {})

    def find(self, spec: ModelSpec) -> CheckpointFiles | None:
        """The model's files, or None where one of them is not on this machine."""
        files = self._expected(spec)
        return None if files is None or files.missing() else files

    def require(self, spec: ModelSpec) -> CheckpointFiles:
        """The model's files.

        Raises:
            WeightsMissing: naming the command that fetches them.
        """
        files = self.find(spec)
        if files is None:
            command = fetch_command(spec)
            remedy = f"fetch them there with: {command}" if command else "its package is incomplete: reinstall it"
            raise WeightsMissing(
                f"the weights of {spec.id} are not on this server; {remedy}",
                field="model",
                metadata={"model": spec.id, "command": command},
            )
        return files

    def _expected(self, spec: ModelSpec) -> CheckpointFiles | None:
        source = spec.source
        folder = self._folders.get(spec.id)
        if folder is not None:
            return _in_folder(folder, source.transformer_file)
        match source:
            case BundledSource(folder=name):
                assets = resources.files("chromarpc_server") / "assets" / name
                return _in_folder(Path(str(assets)), source.transformer_file)
            case HubSource():
                return _in_hub_cache(source)


class ModelFilesElsewhere(ModelFiles):
    """Where the hosts of a cluster have models. Whether they do shows there, so every model counts as present."""

    def find(self, spec: ModelSpec) -> CheckpointFiles:
        """The files as they would lie here."""
        folder = self._folders.get(spec.id, Path(spec.id))
        return super().find(spec) or _in_folder(folder, spec.source.transformer_file)


def _in_folder(folder: Path, transformer_file: str) -> CheckpointFiles:
    preview = folder / "latent_preview.json"
    return CheckpointFiles(
        transformer=folder / transformer_file,
        text_encoder=folder / "text_encoder_2",
        tokenizer=folder / "tokenizer_2",
        vae=folder / "vae",
        preview=preview if preview.is_file() else None,
    )


def _in_hub_cache(source: HubSource) -> CheckpointFiles | None:
    transformer = huggingface_hub.try_to_load_from_cache(source.transformer_repo, source.transformer_file)
    config = huggingface_hub.try_to_load_from_cache(source.extras_repo, "text_encoder_2/config.json")
    if not isinstance(transformer, str) or not isinstance(config, str):
        return None
    extras = Path(config).parent.parent
    return CheckpointFiles(
        transformer=Path(transformer),
        text_encoder=extras / "text_encoder_2",
        tokenizer=extras / "tokenizer_2",
        vae=extras / "vae",
        preview=None,
    )


def fetch(spec: ModelSpec, *, token: str | None = None) -> None:
    """Downloads a model's files into the Hugging Face cache, resuming what an earlier try left.

    Shows huggingface_hub's own progress bars on standard error.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, OSError: what the download ended with.
    """
    source = spec.source
    if not isinstance(source, HubSource):
        return
    huggingface_hub.hf_hub_download(source.transformer_repo, source.transformer_file, token=token)
    huggingface_hub.snapshot_download(source.extras_repo, allow_patterns=list(_EXTRAS_PATTERNS), token=token)
