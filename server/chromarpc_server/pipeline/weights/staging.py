"""Weights from a file to a GPU by way of page-locked pieces, several tensors at a time, hashed as they pass.

A mapped file is read page by page, and the driver copies what it finds there once more; on a machine that has the
file in its page cache both cost more than the bus does. Here threads read whole pieces (`preadv`) and the copy to
the device runs while the next piece is read.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from chromarpc_server.pipeline.device import select_device
from chromarpc_server.pipeline.weights.tensor_file import TensorFile, TensorFileError

PIECE_BYTES = 16 * 1024**2
THREADS = 12
AHEAD_BYTES = 3 * 1024**3
"""Of tensors that are being read and were not taken yet."""


@dataclass
class _Stage:
    """Two pieces of host memory: one is filled while the other is copied."""

    device: torch.device
    pieces: tuple[Tensor, Tensor]
    copied: tuple[torch.cuda.Event, torch.cuda.Event] | None
    turn: int = field(default=0)

    @classmethod
    def make(cls, device: torch.device) -> _Stage:
        on_gpu = device.type == "cuda"
        first, second = (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2))
        return cls(device, (first, second), (torch.cuda.Event(), torch.cuda.Event()) if on_gpu else None)

    def free_piece(self) -> Tensor:
        """The piece whose turn it is, once its last copy is done."""
        self.turn ^= 1
        if self.copied is not None:
            self.copied[self.turn].synchronize()
        return self.pieces[self.turn]

    def note_copy(self) -> None:
        """A copy of that piece was begun."""
        if self.copied is not None:
            # On the stream that copies: without one named, a thread that selected no device marks another's.
            self.copied[self.turn].record(torch.cuda.current_stream(self.device))


def tensor_hash_prefix(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What a tensor's hash covers beside its values."""
    return f"{name}:{dtype}:{shape};".encode()


def read_onto(
    file: TensorFile,
    device: torch.device,
    descriptor: int | None = None,
    *,
    wanted: Container[str] | None = None,
    hashed: bool = True,
) -> Iterator[tuple[str, Tensor, str]]:
    """Tensors of a file in its order, on the device, each with its hash over name, dtype, shape and values.

    Args:
        file: as it was opened.
        device: where the tensors are put.
        descriptor: the file, open for reading, which stays open; by default it is opened here.
        wanted: names of those to read; every one if None.
        hashed: whether to hash the values; else hashes are of the rest alone.

    Raises:
        TensorFileError: the file changed since its header was checked, or cannot be read.
    """
    stages: SimpleQueue[_Stage] = SimpleQueue()
    count = min(THREADS, os.cpu_count() or 1)
    for _ in range(count):
        stages.put(_Stage.make(device))
    try:
        source = os.open(file.path, os.O_RDONLY) if descriptor is None else descriptor
    except OSError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}") from None
    waiting: deque[tuple[str, Tensor, Future[str]]] = deque()
    try:
        begins = file.require_unchanged(source)

        def fill(name: str, held: Tensor) -> str:
            entry = file.tensors[name]
            digest = hashlib.sha256(tensor_hash_prefix(name, entry.torch_dtype, entry.shape))
            stage = stages.get()
            try:
                for offset in range(0, entry.size_bytes, PIECE_BYTES):
                    size = min(PIECE_BYTES, entry.size_bytes - offset)
                    piece = stage.free_piece()[:size]
                    _read(source, piece, begins + entry.begin + offset)
                    values: memoryview = piece.numpy().data
                    held[offset : offset + size].copy_(piece, non_blocking=True)
                    stage.note_copy()
                    if hashed:
                        digest.update(values)
            finally:
                stages.put(stage)
            return digest.hexdigest()

        with ThreadPoolExecutor(count, "read", initializer=select_device, initargs=(device,)) as pool:
            names = iter([name for name in file.tensors if wanted is None or name in wanted])
            ahead = 0
            while True:
                while ahead < AHEAD_BYTES and (name := next(names, None)) is not None:
                    held = torch.empty(file.tensors[name].size_bytes, dtype=torch.uint8, device=device)
                    waiting.append((name, held, pool.submit(fill, name, held)))
                    ahead += held.nbytes
                if not waiting:
                    break
                name, held, filled = waiting.popleft()
                ahead -= held.nbytes
                digest = filled.result()
                entry = file.tensors[name]
                yield name, held.view(entry.torch_dtype).reshape(entry.shape), digest
    except OSError as error:
        raise TensorFileError(f"cannot be read: {error.strerror}") from None
    finally:
        for _, _, filled in waiting:
            filled.cancel()
        if descriptor is None:
            os.close(source)


def _read(descriptor: int, piece: Tensor, offset: int) -> None:
    space: memoryview = piece.numpy().data
    done = 0
    while done < len(space):
        count = os.preadv(descriptor, [space[done:]], offset + done)
        if not count:
            raise TensorFileError("it changed while it was read")
        done += count
