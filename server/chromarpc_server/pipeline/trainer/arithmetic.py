"""How the trainer's process computes: its dtype, its threads, and the precision of its float32 products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch

from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.precision import float32_products

TORCH_DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TORCHAO_QTYPES = ("float8", "int8")
"""Quantizing with torchao 0.10 sets `torch.set_float32_matmul_precision("high")` for the rest of the process."""


def multiplies_in_tf32(settings: TrainerSettings) -> bool:
    """Whether float32 products (an adapter's path, T5's attention) run in TF32 on a GPU.

    They do once torchao has quantized something. The recorded runs without quantization have it on too, since they
    came after one with torchao in the same process.
    """
    return not settings.quantize or settings.qtype in TORCHAO_QTYPES


@contextmanager
def one_thread() -> Iterator[None]:
    """A CPU computes with one thread, whatever the process has set.

    The number is the calling thread's own: other threads that have computed before keep theirs. One that computes
    for the first time meanwhile would take this one over, so a device's thread names its number at first.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def trainer_arithmetic(device: torch.device, settings: TrainerSettings) -> Iterator[None]:
    """One thread on a CPU, and the trainer's precision of float32 products on a GPU, whatever is set besides."""
    with one_thread() if device.type == "cpu" else nullcontext(), trainer_precision(device, settings):
        yield


@contextmanager
def trainer_precision(device: torch.device, settings: TrainerSettings) -> Iterator[None]:
    """The trainer's precision of float32 products on a GPU; nothing on a CPU, where there is one only."""
    with float32_products(device, "tf32" if multiplies_in_tf32(settings) else "ieee"):
        yield
