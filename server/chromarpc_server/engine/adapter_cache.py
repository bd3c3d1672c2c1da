"""Parsed adapters in host memory, so that a switch reads no file twice.

Keyed by what the file system says of a file, not by its name alone: a file that was written anew is read anew.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chromarpc_server.domain.errors import LoraChanged, LoraContentChanged, LoraNotFound
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.pipeline import Adapter, read_adapter


@dataclass(frozen=True)
class AdapterFile:
    """A file as it was when a job was admitted."""

    path: Path
    size_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path, field: str) -> AdapterFile:
        """Looks at the file.

        Raises:
            LoraNotFound: blaming `field`; it went away.
        """
        try:
            status = path.stat()
        except OSError:
            raise LoraNotFound("no such adapter below the server's adapter root", field=field) from None
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def is_same(self, status: os.stat_result) -> bool:
        """Whether this is what the file system says of the same version of the file."""
        return (status.st_size, status.st_mtime_ns, status.st_ino) == (
            self.size_bytes,
            self.modified_ns,
            self.inode,
        )

    def require_still(self) -> None:
        """Looks at the file again.

        Raises:
            LoraChanged: it was written anew, or went away.
        """
        try:
            status = self.path.stat()
        except OSError:
            raise LoraChanged("the adapter went away while the job waited") from None
        if not self.is_same(status):
            raise LoraChanged("the adapter was written anew while the job waited")


def require_expected(lora: PlannedLora, sha256: str, index: int) -> None:
    """Checks the content of a job's adapter, where the request says what it must be.

    Raises:
        LoraContentChanged: blaming `loras.{index}.expected_sha256`.
    """
    if lora.expected_sha256 is not None and lora.expected_sha256 != sha256:
        raise LoraContentChanged(
            "the adapter is another one than the request expects",
            field=f"loras.{index}.expected_sha256",
            metadata={"sha256_expected": lora.expected_sha256, "sha256_now": sha256},
        )


class AdapterCache:
    """Least recently used out first, within a budget of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        """`budget_bytes`: of parsed tensors together; one adapter larger than that is read every time."""
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[tuple[str, AdapterFile], Adapter] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Of the files whose parsed tensors are held."""
        return sum(adapter.size_bytes for adapter in self._held.values())

    def read(
        self,
        file: AdapterFile,
        revision: str,
        targets: Mapping[str, tuple[int, ...]],
        *,
        check: Callable[[], None],
    ) -> Adapter:
        """The adapter, parsed for the checkpoint of this revision.

        Raises:
            LoraInvalid, LoraIncompatible: see `read_adapter`.
            LoraChanged: the file is no longer the one that the job was admitted with.
        """
        key = (revision, file)
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
            return found
        # Both here and in prepared sets the key stands for the bytes: another version must not come in under it.
        file.require_still()
        adapter = read_adapter(file.path, targets, check=check)
        file.require_still()
        self._held[key] = adapter
        while self._held and self.size_bytes > self._budget_bytes:
            self._held.popitem(last=False)
        return adapter

    def clear(self) -> None:
        """Drops everything."""
        self._held.clear()
