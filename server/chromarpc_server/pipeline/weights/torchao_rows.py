"""Float8 weights as the installed torchao makes them, which `verify` holds `quantization` against."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TorchaoRows:
    """Rows as torchao holds them."""

    version: str
    q: Tensor
    """(out, in) float8_e4m3fn."""
    scale: Tensor
    """(out,) in the weight's dtype (torchao 0.10 and 0.11) or in float32 (later versions)."""


def torchao_version() -> str:
    """Of the installed torchao.

    Raises:
        ImportError: there is none, or it cannot be imported beside this torch.
    """
    with _in_silence():
        import torchao  # noqa: PLC0415 - a server does without it, and importing it takes a second

    version: str = torchao.__version__
    return version


def quantize_with_torchao(weight: Tensor) -> TorchaoRows:
    """Quantizes a linear layer's weight (out, in) as the reference asks torchao to: float8, weights only.

    Raises:
        ImportError: as `torchao_version`.
        NotImplementedError: this torchao holds float8 weights in a way that is not known here.
    """
    version = torchao_version()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    with _in_silence():
        from torchao import quantization  # noqa: PLC0415 - as above

        kind = getattr(quantization, "Float8WeightOnlyConfig", None) or getattr(
            quantization, "float8_weight_only", None
        )
        if kind is None:
            raise NotImplementedError(f"torchao {version} has no float8 for weights only")
        # Until 0.12 it also has the whole process multiply float32 in TF32.
        precision = torch.get_float32_matmul_precision()
        try:
            quantization.quantize_(nn.Sequential(linear), kind())
        finally:
            torch.set_float32_matmul_precision(precision)
    held: Any = linear.weight
    try:
        # Until 0.11 behind a layout of its own, later as plain attributes.
        q, scale = held.tensor_impl.get_plain()[:2] if hasattr(held, "tensor_impl") else (held.qdata, held.scale)
    except AttributeError:
        raise NotImplementedError(f"torchao {version} holds float8 weights in another way than others") from None
    if q.dtype != torch.float8_e4m3fn or q.shape != weight.shape or scale.numel() != weight.shape[0]:
        raise NotImplementedError(f"torchao {version} scales its float8 weights in another way than others")
    return TorchaoRows(version, q.detach(), scale.detach().reshape(-1))


@contextmanager
def _in_silence() -> Iterator[None]:
    """Hides what torchao logs and warns of: kernels that are not used here. It also sets up logging for itself."""
    root, below = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(below)
