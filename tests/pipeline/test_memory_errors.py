"""Too little memory is known by class and by words, and a full device is not a lost one."""

from __future__ import annotations

import errno
import gc
from typing import Any

import pytest
import torch

from chromarpc_server.domain.errors import DeviceLost, OutOfMemory
from chromarpc_server.pipeline import memory, probe_device, translate_memory_error

CPU = torch.device("cpu")
_ASYNCHRONOUS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nDevice-side assertion tracking was not "
    "enabled by user."
)

TOO_LITTLE = {
    "torch": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which …"
    ),
    "torch's words in another class": RuntimeError("CUDA out of memory. Tried to allocate 1024.00 MiB (GPU 0; …)"),
    "CUDA's runtime": torch.AcceleratorError("CUDA error: out of memory" + _ASYNCHRONOUS),
    "CUDA's runtime, an older torch": RuntimeError("CUDA error: out of memory" + _ASYNCHRONOUS),
    "CUDA's driver": RuntimeError("CUDA driver error: out of memory"),
    "the driver's name for it": RuntimeError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
    "the runtime's name for it": RuntimeError("cudaHostAlloc: cudaErrorMemoryAllocation"),
    "torch on HIP": RuntimeError("HIP out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total capacity …"),
    "HIP's runtime": RuntimeError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported"),
    "HIP's name for it": RuntimeError("hipErrorOutOfMemory: could not allocate 4096 MB"),
    "Triton on CUDA": RuntimeError("Triton Error [CUDA]: out of memory"),
    "Triton on HIP": RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "hipBLAS": RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1152921504606846976 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch on a CPU of Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    "a mapped file": RuntimeError("unable to mmap 49907246508 bytes from file <x>: Cannot allocate memory (12)"),
    "Python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 8.00 PiB for an array with shape (1125899906842624,)"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}  # fmt: skip

ANYTHING_ELSE = {
    "a poisoned context": RuntimeError("CUDA error: an illegal memory access was encountered" + _ASYNCHRONOUS),
    "the same, another class": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "an assertion on the device": RuntimeError("CUDA error: device-side assert triggered" + _ASYNCHRONOUS),
    "HIP's poisoned context": RuntimeError("HIP error: an illegal memory access was encountered"),
    "a launch that fails": RuntimeError("CUDA error: unspecified launch failure"),
    "a launch that asks too much": RuntimeError("CUDA error: too many resources requested for launch"),
    "a broken card": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "memory that is locked already": RuntimeError(
        "CUDA error: part or all of the requested memory range is already mapped"
    ),
    "a kernel of Triton's that is too large": RuntimeError(
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes or "
        "`num_stages` may help."
    ),
    "Triton's illegal access": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(…)`"),
    "cuDNN has no way": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a …"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    "words of somebody else's": ValueError("out of memory"),
    "another trouble of the system": OSError(errno.ENOENT, "No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("error", TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_too_little_memory_is_known_whoever_says_so(error: Exception) -> None:
    assert isinstance(translate_memory_error(error), OutOfMemory)


@pytest.mark.parametrize("error", ANYTHING_ELSE.values(), ids=ANYTHING_ELSE)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert translate_memory_error(error) is None


def test_what_a_cpu_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert isinstance(translate_memory_error(raised.value), OutOfMemory)


def _raised(outer: ValueError, inner: RuntimeError, how: str) -> Exception:
    try:
        try:
            raise inner
        except RuntimeError as error:
            if how == "beside it":
                raise outer  # noqa: B904 - that is what is tested
            raise outer from (error if how == "of it" else None)
    except ValueError as error:
        return error


@pytest.mark.parametrize(("how", "expected"), [("of it", True), ("beside it", True), ("instead of it", False)])
def test_it_is_found_behind_another_error(how: str, expected: bool) -> None:
    error = _raised(ValueError("a step failed"), RuntimeError("CUDA error: out of memory"), how)
    assert (translate_memory_error(error) is not None) is expected


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert translate_memory_error(first) is None


class Device:
    """Answers what it is told to, one call after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: Exception) -> None:
        self._failures = list(failures)
        self._arange = torch.arange
        self.calls: list[str] = []
        monkeypatch.setattr(torch, "arange", self.arange)
        monkeypatch.setattr("chromarpc_server.pipeline.device.release_memory", self.release)

    def arange(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.calls.append("sum")
        if self._failures:
            raise self._failures.pop(0)
        return self._arange(*arguments, **keywords)

    def release(self, _: torch.device) -> None:
        self.calls.append("release")


FULL = "CUDA error: out of memory"
POISONED = "CUDA error: an illegal memory access was encountered"


def _is_lost() -> bool:
    try:
        probe_device(CPU)
    except DeviceLost:
        return True
    return False


@pytest.mark.parametrize(
    "failures",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError("CUDA out of memory.")),
        (RuntimeError(FULL), RuntimeError(FULL)),
        (RuntimeError(FULL),),
        (RuntimeError("CUDA error: part or all of the requested memory range is already mapped"),),
    ],
    ids=["full", "full in words", "full until memory was released", "a failure of before, told once more"],
)
def test_a_device_that_is_full_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, failures: tuple[Exception, ...]
) -> None:
    device = Device(monkeypatch, *failures)
    assert not _is_lost()
    assert device.calls == ["sum", "release", "sum"]


@pytest.mark.parametrize("failures", [(POISONED, POISONED), (FULL, POISONED)])
def test_a_device_that_fails_again_is_lost(monkeypatch: pytest.MonkeyPatch, failures: tuple[str, ...]) -> None:
    Device(monkeypatch, *(RuntimeError(text) for text in failures))
    assert _is_lost()


class Cudart:
    """Locks ranges, and as the driver refuses those that are locked already."""

    def __init__(self) -> None:
        self.locked: set[int] = set()
        self.refuses = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if self.refuses or address in self.locked:
            return 712
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.locked.remove(address)
        return 0


@pytest.mark.slow
def test_locked_memory_is_unlocked_once_nothing_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After too little memory everything goes and is read anew, often to the same address."""
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tensors = {"a": torch.arange(5.0), "b": torch.ones(3, 2).bfloat16()}
    pinned = memory.pin(tensors, CPU)
    assert len(cudart.locked) == 1
    one = pinned.pop("b")
    del pinned
    gc.collect()
    assert len(cudart.locked) == 1
    assert torch.equal(one, tensors["b"])
    del one
    gc.collect()
    assert not cudart.locked
    cudart.refuses = True
    with pytest.raises(OutOfMemory, match="cannot be locked"):
        memory.pin(tensors, CPU)
    gc.collect()
