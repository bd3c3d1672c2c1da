"""The precision of float32 products on GPUs, which torch has one setting of for the whole process.

cuBLAS is told the precision when a product is given to a GPU, so the setting has to be right just then; what is
computed later, and a graph that is replayed, have it in them. Threads of several GPUs that need the same precision
have it together. One that needs another waits until the last of them has given its products, and whoever comes
later waits behind it. So a product meets the value that it would meet in a process with one device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Precision = Literal["tf32", "ieee"]


class ProductPrecision:
    """The process's setting, and who relies on it."""

    def __init__(self) -> None:
        """Changes nothing."""
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        """Those that wait, in the order in which they came."""
        self._holders: set[int] = set()
        """Threads that hold it, each once."""
        self._now = ""
        """What the holders have; nothing while there are none."""
        self._own = ""
        """What the process has set itself, and has again once nobody holds another one."""
        self._thread = _OfThread()

    @property
    def held(self) -> str | None:
        """What this thread holds; None for nothing."""
        return self._thread.held[-1] if self._thread.held else None

    @contextmanager
    def hold(self, precision: Precision | None) -> Iterator[None]:
        """Has this precision set for what this thread gives to GPUs inside.

        Args:
            precision: None for what this thread holds already, or else what the process has set.
        """
        outer = self.held
        if outer is not None and precision in (None, outer):
            yield
            return
        if outer is not None:
            self._release()
        self._thread.held.append(self._acquire(precision))
        try:
            yield
        finally:
            self._release()
            self._thread.held.pop()
            if outer is not None:
                self._acquire(outer)

    def _acquire(self, precision: str | None) -> str:
        turn = object()
        with self._changed:
            self._queue.append(turn)
            self._changed.wait_for(lambda: self._queue[0] is turn and self._admits(precision))
            self._queue.popleft()
            if not self._holders:
                self._own = torch.backends.cuda.matmul.fp32_precision
                self._now = precision or self._own
                if self._now != self._own:
                    torch.backends.cuda.matmul.fp32_precision = self._now
            self._holders.add(threading.get_ident())
            self._changed.notify_all()
            return precision or self._own

    def _admits(self, precision: str | None) -> bool:
        # cuBLAS is asked for TF32 or it is not: `ieee` and the process's own `none` are one thing to it.
        return not self._holders or ((precision or self._own) == "tf32") == (self._now == "tf32")

    def forget(self, thread: int) -> None:
        """Nobody waits any more for what a thread holds: it gives no products, for its device hangs.

        Args:
            thread: as `threading.get_ident` says it.
        """
        with self._changed:
            if thread not in self._holders:
                return
            self._holders.remove(thread)
            if not self._holders and self._now != self._own:
                torch.backends.cuda.matmul.fp32_precision = self._own
            self._changed.notify_all()

    def _release(self) -> None:
        self.forget(threading.get_ident())


@dataclass
class _OfThread(threading.local):
    held: list[str] = field(default_factory=list)
    """What it asked for, the innermost one last."""


PRODUCT_PRECISION = ProductPrecision()


def _is_shared(device: torch.device) -> bool:
    """Whether products on this device look at the setting; a CPU has one precision only."""
    return device.type == "cuda"


@contextmanager
def float32_products(device: torch.device, precision: Precision | None = None) -> Iterator[None]:
    """Float32 products that are given to a GPU inside have this precision, whatever other threads do.

    Every product of float32 tensors on a GPU has to be given inside, for a GPU's thread may not meet the precision
    that another one asked for.

    Args:
        device: where the products are computed.
        precision: None for that of whoever calls, and by default the process's own.
    """
    if not _is_shared(device):
        yield
        return
    with PRODUCT_PRECISION.hold(precision):
        yield
