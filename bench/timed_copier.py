"""Copies of streamed blocks, timed on both streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chromarpc_server.pipeline import synchronize
from chromarpc_server.pipeline.fused.streaming import StreamCopier


@dataclass(frozen=True)
class Copied:
    """What the blocks' copies did over an image."""

    size_bytes: int = 0
    seconds: float = 0.0
    """That they took, one after the other."""
    waited_s: float = 0.0
    """That blocks waited for them."""


class TimedCopier(StreamCopier):
    """Copies as a server does, between marks in both streams."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def copy(self, target: Tensor, source: Tensor) -> object:
        """See `Copier.copy`."""
        given = torch.cuda.Event()
        given.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(given)
        begun = _mark(self.stream)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        copied = _mark(self.stream)
        self._copies.append((begun, copied, source.nbytes))
        return copied

    def wait(self, copied: object) -> None:
        """See `Copier.wait`."""
        working = torch.cuda.current_stream(self.device)
        before = _mark(working)
        super().wait(copied)
        self._waits.append((before, _mark(working)))

    def taken(self) -> Copied:
        """Of everything since the last call, once it is done."""
        synchronize(self.device)
        found = Copied(
            sum(size for _, _, size in self._copies),
            sum(begun.elapsed_time(copied) for begun, copied, _ in self._copies) / 1000,
            sum(before.elapsed_time(after) for before, after in self._waits) / 1000,
        )
        self._copies.clear()
        self._waits.clear()
        return found


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
