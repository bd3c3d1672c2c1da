"""Recording a GPU's work as a CUDA graph, on the device that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

from chromarpc_server.pipeline.device import on_device

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: _POOL_HANDLE | None = None
) -> Iterator[None]:
    """What is given to the device inside is recorded and not run.

    torch would record on a stream of the device that was current when the process recorded first, and leaves that
    stream the current one where recording fails.
    """
    with on_device(device):
        torch.cuda.synchronize(device)
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                yield
        finally:
            torch.cuda.set_stream(before)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
