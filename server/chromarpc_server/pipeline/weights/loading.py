"""From open files of weights to tensors, with progress and cancellation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.progress import Check, LoadContext, LoadProgress
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsError
from chromarpc_server.pipeline.weights.shared import HostWeights, SharedFile
from chromarpc_server.pipeline.weights.staging import read_onto

PAGE_BYTES = 4096


class ReadingProgress:
    """Counts bytes over several files and reports how far reading is."""

    def __init__(self, files: tuple[SharedFile, ...], context: LoadContext) -> None:
        """`files`: all that will be read; `context`: who hears of it, and may stop it."""
        self._total = sum(_size_bytes(file) for file in files)
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

    def read(self, file: SharedFile) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one of the files, mapped. To be called inside its `reading`.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            mapped = file.mapped()
        except SafetensorsError as error:
            raise WeightsInvalid(f"{file.header.path.name}: {error}") from None
        self.mapped.append(mapped)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="read") as pool:
            # A mapped tensor's pages come one by one to whoever touches them first; here many threads do.
            untouched = [] if file.was_read else list(mapped.values())
            touched = [pool.submit(_touch, tensor) for tensor in untouched]
            try:
                for index, (name, tensor) in enumerate(mapped.items()):
                    if touched:
                        touched[index].result()
                    self._context.check()
                    yield name, tensor
                    self._count(file, file.header.tensors[name].size_bytes)
            finally:
                for touch in touched:
                    touch.cancel()

    def read_onto(
        self, file: SharedFile, device: torch.device, *, hashed: bool = False
    ) -> Iterator[tuple[str, Tensor, str]]:
        """The same, on a device, each with its hash over name, dtype, shape and values where it is `hashed`.

        Raises:
            WeightsInvalid: the file cannot be read after all.
        """
        try:
            for name, tensor, digest in read_onto(file.header, device, file.descriptor(), hashed=hashed):
                self._context.check()
                yield name, tensor, digest
                self._count(file, file.header.tensors[name].size_bytes)
        except SafetensorsError as error:
            raise WeightsInvalid(f"{file.header.path.name}: {error}") from None
        except OSError as error:
            raise WeightsInvalid(f"{file.header.path.name}: cannot be read: {error.strerror}") from None

    def skip(self, file: SharedFile) -> None:
        """One of the files need not be read: what it holds is there."""
        self._count(file, _size_bytes(file))

    def _count(self, file: SharedFile, size_bytes: int) -> None:
        file.note_progress()
        self.note_progress()
        self._done += size_bytes
        self._context.progress(LoadProgress("reading", self._done, self._total))


def _size_bytes(file: SharedFile) -> int:
    return sum(entry.size_bytes for entry in file.header.tensors.values())


def _touch(tensor: Tensor) -> None:
    """Has every page of a tensor's memory read."""
    if tensor.is_contiguous() and tensor.nbytes >= PAGE_BYTES:
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].max()
