"""Finds adapter files below one folder, and nothing outside it."""

from __future__ import annotations

from pathlib import Path

from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.domain.errors import LoraNotFound

NO_ROOT = "this server serves no adapters from its disk: its operator sets the folder by --lora-root"
"""Said of whatever path, so that it tells nothing of the disk."""


class AdapterRoot:
    """The folder that requests' adapter paths are relative to."""

    def __init__(self, root: Path | None) -> None:
        """`root` None serves no adapters at all."""
        self._root = root.resolve() if root is not None else None

    def locate(self, path: str, field: str, owner: str = NOBODY.name) -> Path:  # noqa: ARG002 - what is below is all's
        """The file that `path` names, with every symbolic link followed.

        Absolute paths, `..`, links that leave the root, folders and absent files all give the same answer,
        so that a client cannot probe the server's disk. Without a root every path has an answer of its own kind.

        Raises:
            LoraNotFound: blaming `field`.
        """
        if self._root is None:
            raise LoraNotFound(NO_ROOT, field=field)
        missing = LoraNotFound("no such adapter below the server's adapter root", field=field)
        parts = path.replace("\\", "/").split("/")
        if not path or "\0" in path or ".." in parts or Path(path).is_absolute():
            raise missing
        try:
            file = (self._root / path).resolve(strict=True)
            is_inside = file.is_relative_to(self._root) and file.is_file()
        except (OSError, RuntimeError, ValueError):
            raise missing from None
        if not is_inside:
            raise missing
        return file
