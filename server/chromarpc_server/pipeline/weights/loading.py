"""From open files of weights to tensors, with progress and cancellation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.progress import Check, LoadContext, LoadProgress
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.shared import HostWeights, SharedFile
from chromarpc_server.pipeline.weights.staging import read_onto
from chromarpc_server.pipeline.weights.stored import StoredWeights
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError

PAGE_BYTES = 4096


class ReadingProgress:
    """Counts bytes over several parts of a model and reports how far reading is."""

    def __init__(self, parts: Sequence[StoredPart], context: LoadContext) -> None:
        """`parts`: all that will be read; `context`: who hears of it, and may stop it."""
        self._total = sum(part.size_bytes for part in parts)
        self._done = 0
        self._context = context
        self.note_progress: Callable[[], None] = lambda: None
        """Whom else to tell that it gets on: see `WeightFiles.pinned`."""
        self.mapped: list[HostWeights] = []
        """What was mapped for it: held, others that load the same files take it."""

    @property
    def check(self) -> Check:
        """Raises to stop."""
        return self._context.check

    def stored(self, part: StoredPart, onto: torch.device | None = None) -> StoredWeights:
        """A part as it is stored, mapped, or on a device.

        Raises:
            WeightsInvalid: a file cannot be read after all.
        """
        pieces: dict[str, Tensor] = {}
        for file, names in part.wanted.items():
            with file.reading(names, self.check):
                if onto is None:
                    pieces.update(self.read(file, names))
                else:
                    pieces.update((name, tensor) for name, tensor, _ in self.read_onto(file, names, onto))
        return StoredWeights(part.recipes, pieces)

    def read(self, file: SharedFile, names: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Some tensors of one of the files, mapped. To be called inside its `reading`.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            mapped = file.mapped()
        except TensorFileError as error:
            raise WeightsInvalid(f"{file.header.path.name}: {error}") from None
        self.mapped.append(mapped)
        wanted = {name: tensor for name, tensor in mapped.items() if name in names}
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="read") as pool:
            # A mapped tensor's pages come one by one to whoever touches them first; here many threads do.
            untouched = [] if file.was_read(names) else list(wanted.values())
            touched = [pool.submit(_touch, tensor) for tensor in untouched]
            try:
                for index, (name, tensor) in enumerate(wanted.items()):
                    if touched:
                        touched[index].result()
                    self._context.check()
                    yield name, tensor
                    self._count(file, file.header.tensors[name].size_bytes)
            finally:
                for touch in touched:
                    touch.cancel()

    def read_onto(
        self, file: SharedFile, names: frozenset[str], device: torch.device, *, hashed: bool = False
    ) -> Iterator[tuple[str, Tensor, str]]:
        """The same, on a device, each with its hash over name, dtype, shape and values where it is `hashed`.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            for name, tensor, digest in read_onto(
                file.header, device, file.descriptor(), wanted=names, hashed=hashed
            ):
                self._context.check()
                yield name, tensor, digest
                self._count(file, file.header.tensors[name].size_bytes)
        except TensorFileError as error:
            raise WeightsInvalid(f"{file.header.path.name}: {error}") from None
        except OSError as error:
            raise WeightsInvalid(f"{file.header.path.name}: cannot be read: {error.strerror}") from None

    def skip(self, part: StoredPart) -> None:
        """One of the parts need not be read: what it holds is there."""
        self._note(part.size_bytes)

    def _count(self, file: SharedFile, size_bytes: int) -> None:
        file.note_progress()
        self._note(size_bytes)

    def _note(self, size_bytes: int) -> None:
        self.note_progress()
        self._done += size_bytes
        self._context.progress(LoadProgress("reading", self._done, self._total))


def _touch(tensor: Tensor) -> None:
    """Has every page of a tensor's memory read."""
    if tensor.is_contiguous() and tensor.nbytes >= PAGE_BYTES:
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].max()
