"""Parsed adapters in host memory, so that a switch reads no file twice.

Keyed by what a file stands for: one below the root by what the file system says of it, so that it is read anew
once it was written anew; an uploaded or downloaded one by its hash, which its bytes had when they were read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.reading import read_checked
from chromarpc_server.pipeline import Adapter, Check


class AdapterCache:
    """Least recently used out first, within a budget of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        """`budget_bytes`: of parsed tensors together; one adapter larger than that is read every time."""
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[tuple[str, AdapterFile], Adapter] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Of the files whose parsed tensors are held, and of what was made of these to lie beside weights."""
        return sum(adapter.held_bytes for adapter in self._held.values())

    def read(
        self,
        file: AdapterFile,
        revision: str,
        targets: Mapping[str, tuple[int, ...]],
        *,
        check: Check,
    ) -> Adapter:
        """The adapter, parsed for the checkpoint of this revision.

        Raises:
            LoraInvalid, LoraIncompatible: see `read_adapter`.
            LoraDamaged: the file's bytes are not those that its name stands for.
            LoraChanged: the file is no longer the one that the job was admitted with.
        """
        key = (revision, file)
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
            return found
        # Here and for prepared weights the key stands for the bytes: another version must not come in under it.
        adapter = read_checked(file, targets, check=check)
        self._held[key] = adapter
        self.trim()
        return adapter

    def trim(self) -> None:
        """Drops what is beyond the budget: adapters grow when they first lie beside weights."""
        while self._held and self.size_bytes > self._budget_bytes:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """Drops everything."""
        self._held.clear()
