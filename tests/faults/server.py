"""The server as it is shipped, with one fault planted in its pipeline.

Run as `FAULT=name python -m tests.faults.server` with the server's own flags. The fault happens once, or
`FAULT_TIMES` times, before the second step of the next job.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from chromarpc_server.__main__ import main
from chromarpc_server.pipeline import pipeline
from chromarpc_server.runtime import worker

HANGS = "the device thread hangs from here on"


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def _lose_device() -> None:
    lost, real = threading.get_ident(), worker.probe_device

    def probe(device: torch.device) -> None:
        if threading.get_ident() == lost:
            raise worker.DeviceLost("the device failed and cannot be used any more")
        real(device)

    worker.probe_device = probe
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _fill_device() -> None:
    """A card that others fill: not even the probe's small sum fits."""
    real, arange = worker.probe_device, torch.arange

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    def probe(device: torch.device) -> None:
        torch.arange = full  # type: ignore[assignment]
        try:
            real(device)
        finally:
            torch.arange = arange

    worker.probe_device = probe
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def _hang() -> None:
    print(HANGS, file=sys.stderr, flush=True)
    threading.Event().wait()


FAULTS: Mapping[str, Callable[[], None]] = {
    "device_lost": _lose_device,
    "frightening_text": _raise(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "hang": _hang,
    "out_of_memory": _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")),
    "full_device": _fill_device,
    "out_of_memory_in_words": _raise(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    ),
    "exception": _raise(KeyError("/secret/path")),
    "thread_ends": _raise(SystemExit(3)),
}


def plant(name: str) -> None:
    """Puts the fault into its place."""
    real = pipeline.denoise_from
    left = threading.Semaphore(int(os.environ.get("FAULT_TIMES", "1")))

    def denoise_from(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for index, step in enumerate(real(*arguments, **keywords)):
            if index == 1 and left.acquire(blocking=False):
                FAULTS[name]()
            yield step

    pipeline.denoise_from = denoise_from


if __name__ == "__main__":
    plant(os.environ["FAULT"])
    main()
