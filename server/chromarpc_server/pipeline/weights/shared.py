"""Files of weights that several devices of a process load: read from disk and hashed once, in host memory once.

One device reads a version of a file at a time until it was read whole; the others wait, then take what is in host
memory: the mapping on CPUs, the page-locked copy where the memory plan has one. Where masters lie on GPUs there is
no copy on the host, and none is made: each GPU reads by the same descriptor, from the system's page cache once one
has read it, and what was hashed is not hashed again. (Copying from GPU to GPU would have one device's thread give
work to another device, which may be drawing, recording or lost.)

Nothing is kept here: what no checkpoint holds any more is gone.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from chromarpc_server.pipeline.memory import pin
from chromarpc_server.pipeline.progress import Check
from chromarpc_server.pipeline.weights.reading import open_weights
from chromarpc_server.pipeline.weights.tensor_file import TensorFile, TensorFileError

LOOK_EVERY_S = 0.05
"""How often a thread that waits for another looks whether its own job was stopped."""
STALLED_S = 300.0
"""Whoever gets no further for so long is not waited for: its device may hang, which is not to hold up others."""

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of a file: another version of it differs."""


class HostWeights(dict[str, Tensor]):
    """Tensors in host memory by name, which are there as long as somebody holds this."""


class Turn:
    """One thread at a time; those that wait can be stopped."""

    def __init__(self) -> None:
        """Nobody has it."""
        self._changed = threading.Condition()
        self._owner: object | None = None
        self._moved_at = 0.0

    @contextmanager
    def take(self, check: Check) -> Iterator[None]:
        """Waits for it.

        Args:
            check: called while waiting; may raise to stop.
        """
        mine = object()
        while True:
            check()
            with self._changed:
                if self._changed.wait_for(self._is_free, LOOK_EVERY_S):
                    self._owner = mine
                    break
        self.note_progress()
        try:
            yield
        finally:
            with self._changed:
                if self._owner is mine:  # else it took so long that another one has it
                    self._owner = None
                    self._changed.notify_all()

    def note_progress(self) -> None:
        """Whoever has it gets on."""
        self._moved_at = time.monotonic()

    def _is_free(self) -> bool:
        return self._owner is None or time.monotonic() - self._moved_at > STALLED_S


class SharedFile:
    """One version of a file of weights. Any thread may use it."""

    def __init__(self, header: TensorFile, identity: Identity) -> None:
        """`header`: as it was checked; `identity`: of the version that it is of."""
        self.header = header
        self.identity = identity
        self.hashes: dict[str, str] = {}
        """Of those of its tensors that were hashed, over name, dtype, shape and values."""
        self._turn = Turn()
        self._read: frozenset[str] = frozenset()
        self._opening = threading.Lock()
        self._mapped: weakref.ref[HostWeights] | None = None
        self._descriptor: int | None = None

    @contextmanager
    def reading(self, names: frozenset[str], check: Check) -> Iterator[None]:
        """Whoever reads of the file does so inside: one after the other until one has read those tensors.

        Args:
            names: of the tensors that are going to be read.
            check: called while waiting; may raise to stop.
        """
        if not self.was_read(names):
            with self._turn.take(check):
                if not self.was_read(names):
                    yield
                    self._read |= names
                    return
        yield

    def was_read(self, names: frozenset[str]) -> bool:
        """Whether some thread has read these tensors, so that they are in the system's page cache."""
        return names <= self._read

    def note_progress(self) -> None:
        """Whoever reads it gets on."""
        self._turn.note_progress()

    def mapped(self) -> HostWeights:
        """Its tensors, mapped: the same for everybody as long as anybody holds them.

        Raises:
            TensorFileError: the file changed since its header was checked.
        """
        with self._opening:
            found = None if self._mapped is None else self._mapped()
            if found is None:
                found = HostWeights(self.header.read())
                self._mapped = weakref.ref(found)
            return found

    def descriptor(self) -> int:
        """To read it by, open as long as this is held.

        Raises:
            TensorFileError: the file changed since its header was checked.
            OSError: it cannot be read.
        """
        with self._opening:
            if self._descriptor is None:
                self._descriptor = os.open(self.header.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
            if file_identity(os.fstat(self._descriptor)) != self.identity:
                raise TensorFileError("it changed while it was read")
            return self._descriptor


class WeightFiles:
    """Files of weights that devices of one process have open, and page-locked tensors that they have in common."""

    def __init__(self, opens: Callable[[Path], TensorFile] = open_weights) -> None:
        """`opens`: checks a file's header."""
        self._opens = opens
        self._lock = threading.Lock()
        self._files: weakref.WeakValueDictionary[Identity, SharedFile] = weakref.WeakValueDictionary()
        self._pinned: weakref.WeakValueDictionary[Hashable, HostWeights] = weakref.WeakValueDictionary()
        self._turns: weakref.WeakValueDictionary[Hashable, Turn] = weakref.WeakValueDictionary()

    def open(self, path: Path) -> SharedFile:
        """The file as it is now: what others have open, where it is the same version.

        Raises:
            WeightsInvalid: naming the file and what is wrong with it.
        """
        with self._lock:
            while True:
                before = _identity_of(path)
                found = None if before is None else self._files.get(before)
                if found is not None:
                    return found
                header = self._opens(path)
                if before is not None and before == _identity_of(path):
                    found = self._files[before] = SharedFile(header, before)
                    return found

    def pinned_bytes(self, key: Hashable) -> int:
        """Of what is page-locked under this key: 0 where nothing is."""
        with self._lock:
            found = self._pinned.get(key)
        return 0 if found is None else sum(tensor.nbytes for tensor in found.values())

    def pinned(
        self,
        key: Hashable,
        device: torch.device,
        make: Callable[[Callable[[], None]], Mapping[str, Tensor]],
        check: Check,
    ) -> HostWeights:
        """Page-locked copies of tensors, for every GPU of the process; one, as long as anybody holds it.

        Args:
            key: of tensors that are the same, bit for bit.
            device: the GPU that asks.
            make: gives the tensors, where there is no copy yet; calls what it is given whenever it gets on.
            check: called while another thread makes the copy; may raise to stop.

        Raises:
            OutOfMemory: the system does not allow it.
        """
        with self._lock:
            turn = self._turns.setdefault(key, Turn())
        with turn.take(check):
            found = self._pinned.get(key)
            if found is None:
                found = HostWeights(pin(make(turn.note_progress), device))
                self._pinned[key] = found
            return found


def _identity_of(path: Path) -> Identity | None:
    with suppress(OSError):
        return file_identity(path.stat())
    return None


def file_identity(status: os.stat_result) -> Identity:
    """Of the version of a file that this is the status of."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
