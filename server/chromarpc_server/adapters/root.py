"""Finds adapter files below one folder, and nothing outside it."""

from __future__ import annotations

from pathlib import Path, PurePath

from chromarpc_server.adapters.beneath import entries_below
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.names import HASH_PREFIX, SUFFIX
from chromarpc_server.domain.errors import LoraNotFound
from chromarpc_server.domain.resolve import MAX_LORA_PATH_BYTES

MAX_DEPTH = 8
"""Folders below the root that are looked into."""
MAX_FILES = 10_000
MAX_ENTRIES = 100_000
"""Files and folders of any kind that one listing looks at."""
_TRIES = 3
"""How often a path is followed anew because something on it was swapped meanwhile."""

NO_ROOT = "this server serves no adapters from its disk: its operator sets the folder by --lora-root"
"""The answer to every path, so that it says nothing of the disk."""


class AdapterRoot:
    """The folder that requests' adapter paths are relative to."""

    def __init__(self, root: Path | None) -> None:
        """`root` None serves no adapters at all."""
        self._root = root.resolve() if root is not None else None
        spellings = () if root is None else (root.absolute(), root.resolve())
        self._spellings = tuple(spelling for spelling in spellings if ".." not in spelling.parts)
        """How absolute paths may begin."""

    @property
    def folder(self) -> Path | None:
        """The root itself, without links; None where no adapters are served from the disk."""
        return self._root

    def locate(self, path: str, field: str) -> AdapterFile:
        """The file that `path` names, with every symbolic link followed.

        An absolute path leads below the root, or is not looked at. `..`, links that leave the root, folders and
        absent files all give the same answer, so that a client cannot probe the server's disk. Without a root
        every path has an answer of its own kind.

        Raises:
            LoraNotFound: blaming `field`.
        """
        if self._root is None:
            raise LoraNotFound(NO_ROOT, field=field)
        is_absolute = Path(path).is_absolute()
        hint = "; give its path relative to that root, or an absolute one below it" if is_absolute else ""
        missing = LoraNotFound(f"no such adapter below the server's adapter root{hint}", field=field)
        if not path or "\0" in path or ".." in path.replace("\\", "/").split("/"):
            raise missing
        below = self._relative(path) if is_absolute else Path(path)
        if below is None:
            raise missing
        for _ in range(_TRIES):
            try:
                file = (self._root / below).resolve(strict=True)
            except (OSError, RuntimeError, ValueError):
                raise missing from None
            if not file.is_relative_to(self._root) or file == self._root:
                raise missing
            try:
                return AdapterFile.of(file, field, below=self._root)
            except LoraNotFound:
                # No file, or no longer what the path led to a moment ago.
                continue
        raise missing

    def files(self) -> tuple[dict[str, AdapterFile], bool]:
        """The adapters by the paths that requests can name them by, in any order.

        The second value says whether there is more than `MAX_DEPTH`, `MAX_FILES` and `MAX_ENTRIES` let it look at.
        """
        found: dict[str, AdapterFile] = {}
        folders = [("", 0)]
        looked_at = 0
        truncated = False
        while folders:
            below, depth = folders.pop()
            for name, is_folder in self._entries(below):
                looked_at += 1
                if looked_at > MAX_ENTRIES or len(found) >= MAX_FILES:
                    return found, True
                path = f"{below}{name}"
                if is_folder:
                    if depth < MAX_DEPTH:
                        folders.append((f"{path}/", depth + 1))
                    else:
                        truncated = True
                elif name.endswith(SUFFIX) and (file := self._named(path)):
                    found[path] = file
        return found, truncated

    def distinct_files(self) -> list[AdapterFile]:
        """The files among what `files` looks at; one that several paths lead to is there once."""
        return list(dict.fromkeys(self.files()[0].values()))

    def _entries(self, below: str) -> list[tuple[str, bool]]:
        """What lies in a folder, by name, each with whether it is a folder; nothing where it cannot be listed."""
        if self._root is None:
            return []
        try:
            return entries_below(self._root, PurePath(below))
        except OSError:
            return []

    def _named(self, path: str) -> AdapterFile | None:
        """The adapter of this path, where a request could name it."""
        try:
            if path.startswith(HASH_PREFIX) or len(path.encode()) > MAX_LORA_PATH_BYTES:
                return None
            return self.locate(path, "path")
        except (LoraNotFound, OSError, UnicodeEncodeError):
            return None

    def _relative(self, path: str) -> Path | None:
        """The part of an absolute path that follows the root's, as text alone; None where it begins otherwise."""
        whole = Path("/" + path.lstrip("/"))
        return next((whole.relative_to(root) for root in self._spellings if whole.is_relative_to(root)), None)
