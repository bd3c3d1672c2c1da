"""Too little memory, as torch, the driver, Triton, the GPU's libraries and the host's allocators report it.

Only a part of it is raised as a class of its own; the rest is known by its words. Words that a library uses for
other failures as well (cuDNN's "unable to find an engine", cuBLAS's NOT_INITIALIZED) do not count, nor does
Triton's "out of resource", which is a kernel that needs more shared memory than the GPU has.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import torch

from chromarpc_server.domain.errors import OutOfMemory

_ON_THE_DEVICE = re.compile(
    r"""
    \bout\ of\ (?:device\ |host\ )?memory\b      # torch: "CUDA out of memory", "HIP error: out of memory"; Triton
    | (?:CUDA_ERROR_|hipError|cudaError)_?out_?of_?memory
    | (?:cuda|hip)ErrorMemoryAllocation
    | (?:cublas|cudnn|cusolver|cusparse|hipblas|hipsolver|hipsparse)_STATUS_ALLOC_FAILED
    | CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED
    | CUFFT_ALLOC_FAILED | miopenStatusAllocFailed | rocblas_status_memory_error
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ON_THE_HOST = re.compile(
    r"""
    can(?:'t|not)\ allocate\ memory              # torch's CPU allocator, and what the system says of ENOMEM
    | not\ enough\ memory:\ you\ tried\ to\ allocate
    | could\ not\ allocate\ memory
    | std::bad_alloc
    """,
    re.IGNORECASE | re.VERBOSE,
)


def translate_memory_error(error: BaseException) -> OutOfMemory | None:
    """An exception that means too little memory, as it is reported to clients; None for any other.

    Also where another exception was raised of it, or while it was handled.
    """
    for link in _chain(error):
        if _is_of_the_host(link):
            return OutOfMemory("the server has too little host memory")
        if _is_of_the_device(link):
            return OutOfMemory("the device has too little memory")
    return None


def lacks_host_memory(error: BaseException) -> bool:
    """Whether it is the host's memory that an exception means, and not a device's."""
    first = next((link for link in _chain(error) if _is_of_the_host(link) or _is_of_the_device(link)), None)
    return first is not None and _is_of_the_host(first)


def forget_frames(error: BaseException) -> None:
    """Lets go of what the frames of a chain of exceptions hold: the tensors that filled the memory."""
    for link in _chain(error):
        link.__traceback__ = None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those behind it as a traceback would show them."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_of_the_host(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _ON_THE_HOST.search(str(error)) is not None
    )


def _is_of_the_device(error: BaseException) -> bool:
    # torch.AcceleratorError, which a failed call of the CUDA runtime raises, is a RuntimeError; so is Triton's.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _ON_THE_DEVICE.search(str(error)) is not None
    )
