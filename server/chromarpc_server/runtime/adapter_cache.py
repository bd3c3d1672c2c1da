"""Parsed adapters in host memory, for all devices of a process, so that a switch reads no file twice.

Keyed by what a file stands for: one below the root by what the file system says of it, so that it is read anew
once it was written anew; an uploaded or downloaded one by its hash, which its bytes had when they were read.

Nothing in it belongs to a device: an adapter's tensors, and the factors that are made of them once to lie beside
weights, stay in host memory and are only read; what a device needs of them it copies.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.reading import read_checked
from chromarpc_server.pipeline import Adapter, Check

LOOK_EVERY_S = 0.05
"""How often a thread that waits for another's parsing looks whether its own job was stopped."""

_Key = tuple[str, AdapterFile]
"""Revision of the checkpoint that it is parsed for, and file."""


@dataclass
class _Parsing:
    """A file that a thread parses now; others wait for what becomes of it."""

    adapter: Adapter | None = None
    ended: bool = False


class AdapterCache:
    """Least recently used out first, within a budget of bytes. Any thread may use it."""

    def __init__(self, budget_bytes: int) -> None:
        """`budget_bytes`: of parsed tensors together; one adapter larger than that is read every time."""
        self._budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._held: OrderedDict[_Key, Adapter] = OrderedDict()
        self._parsing: dict[_Key, _Parsing] = {}
        self._files: frozenset[AdapterFile] = frozenset()
        """Those of `_held`; replaced whole, so that nobody has to wait to look at it."""

    @property
    def size_bytes(self) -> int:
        """Of the files whose parsed tensors are held, and of what was made of these to lie beside weights."""
        with self._changed:
            return self._size_bytes()

    def has_parsed(self, file: AdapterFile) -> bool:
        """Whether it is held, for whichever checkpoint; answers at once."""
        return file in self._files

    def read(
        self,
        file: AdapterFile,
        revision: str,
        targets: Mapping[str, tuple[int, ...]],
        *,
        check: Check,
    ) -> Adapter:
        """The adapter, parsed for the checkpoint of this revision; by another thread, where one is at it.

        Args:
            file: as it was found.
            revision: of the checkpoint.
            targets: its parameters, name to shape.
            check: called between pieces of work, and while waiting; may raise to stop.

        Raises:
            LoraInvalid, LoraIncompatible: see `read_adapter`.
            LoraDamaged: the file's bytes are not those that its name stands for.
            LoraChanged: the file is no longer the one that the job was admitted with.
        """
        key = (revision, file)
        while True:
            with self._changed:
                found = self._held.get(key)
                if found is not None:
                    self._held.move_to_end(key)
                    return found
                parsing = self._parsing.get(key)
                if parsing is None:
                    mine = self._parsing[key] = _Parsing()
                    break
            adapter = self._wait(parsing, check)
            if adapter is not None:
                return adapter
            # It was stopped, or the file cannot be used, which the error has to say for this job's own sake.
        try:
            # Here and for prepared weights the key stands for the bytes: no other version may come in under it.
            mine.adapter = read_checked(file, targets, check=check)
        finally:
            self._end(key, mine)
        return mine.adapter

    def trim(self) -> None:
        """Drops what is beyond the budget: adapters grow when they first lie beside weights."""
        with self._changed:
            self._trim()

    def clear(self) -> None:
        """Drops everything."""
        with self._changed:
            self._held.clear()
            self._files = frozenset()

    def _wait(self, parsing: _Parsing, check: Check) -> Adapter | None:
        """What another thread's parsing gives; None where it gives nothing."""
        while True:
            check()
            with self._changed:
                if self._changed.wait_for(lambda: parsing.ended, LOOK_EVERY_S):
                    return parsing.adapter

    def _end(self, key: _Key, parsing: _Parsing) -> None:
        with self._changed:
            parsing.ended = True
            del self._parsing[key]
            if parsing.adapter is not None:
                self._held[key] = parsing.adapter
                self._trim()
            self._changed.notify_all()

    def _trim(self) -> None:
        while self._held and self._size_bytes() > self._budget_bytes:
            self._held.popitem(last=False)
        self._files = frozenset(file for _, file in self._held)

    def _size_bytes(self) -> int:
        return sum(adapter.held_bytes for adapter in self._held.values())
