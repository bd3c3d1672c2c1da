"""The weight quantizers that a training config can name, each as the library that the trainer uses computes it.

All arithmetic is in the weight's dtype. A quantizer gives `W̃`, the weight that products use; holding it in the
weight's dtype loses nothing. Sources: optimum-quanto 0.2.4 (`q…`), torchao 0.10.0 (`float8`, `int8`, `uint…`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid, first_named
from chromarpc_server.pipeline.weights.quantization import FLOAT8, dequantize_rows, quantize_rows

FLOAT8_QTYPES = ("qfloat8", "float8")
"""Quantizers whose weights can be held in e4m3."""
ZEROS_BECOME_NAN = ("qfloat8", "qfloat8_e5m2")
"""Quantizers that keep 0 / 0 of a row of zeros. `qint8`, `qint4` and `qint2` divide by zero, too, but integers
know no NaN, and a scale of 0 makes zeros of any; the others have a smallest scale."""
UINT_GROUP = 64
SMALLEST_SCALE = torch.finfo(torch.float32).eps
QUANTO_GROUPS = (128, 96, 64, 32)
"""Values of a row that share scale and shift in quanto's 2 and 4 bits: the first that divides the row."""


class Bias(Enum):
    """Where a linear layer's bias is added."""

    FUSED = "fused"
    """Before the product is rounded, as `torch.nn.functional.linear` does."""
    AFTER = "after"
    """To the rounded product."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer's weight as the trainer multiplies by it."""

    weight: Tensor = field(repr=False)
    """(out, in) in the dtype that is computed in."""
    bias: Bias
    scale: Tensor | None = field(repr=False, default=None)
    """(out,): multiplies the rounded product, where the library does so instead of scaling the weight."""

    codes: tuple[Tensor, Tensor] | None = field(repr=False, default=None)
    """float8 values (out, in) and their scales (out,), whose product `weight` is: the same in half the memory."""

    @property
    def dequantized(self) -> Tensor:
        """W̃: (out, in)."""
        return self.weight if self.scale is None else self.weight * self.scale[:, None]


@dataclass(frozen=True)
class Quantizer:
    """One entry of the config's `qtype`."""

    name: str
    quantize: Callable[[Tensor], QuantizedLinear]
    """(out, in) → the weight as it is multiplied by."""


def _rows(weight: Tensor, dtype: torch.dtype, largest: float) -> QuantizedLinear:
    """Quanto's symmetric quantizers: s = max|row| / largest, W̃ = s · dtype(clamp(W / s))."""
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    scaled = weight / scale
    if not dtype.is_floating_point:
        scaled = torch.round(scaled)
    lowest = -largest if dtype.is_floating_point else float(torch.iinfo(dtype).min)
    codes = torch.clamp(scaled, lowest, largest).to(dtype)
    held = (codes, scale[:, 0]) if dtype == FLOAT8 else None
    return QuantizedLinear(scale * codes.to(weight.dtype), Bias.AFTER, codes=held)


def _affine(weight: Tensor, bits: int) -> QuantizedLinear:
    """Quanto's 2 and 4 bits: scale and shift for each group of a row, rounded up from the smallest value."""
    size = weight.shape[1]
    group = next((n for n in QUANTO_GROUPS if size % n == 0), size) if size > QUANTO_GROUPS[0] else size
    grouped = weight.reshape(-1, group)
    low, high = grouped.amin(dim=1, keepdim=True), grouped.amax(dim=1, keepdim=True)
    scale, shift = (high - low) / (2**bits - 1), -low
    codes = torch.clamp(torch.round((grouped + shift) / scale), 0, 2**bits - 1).to(torch.uint8)
    return QuantizedLinear((scale * codes - shift).reshape(weight.shape), Bias.AFTER)


def reference_float8(weight: Tensor) -> QuantizedLinear:
    """Torchao 0.10's float8, which the reference quantizes everything with."""
    codes = quantize_rows(weight)
    return QuantizedLinear(dequantize_rows(*codes), Bias.FUSED, codes=codes)


def _int8(weight: Tensor) -> QuantizedLinear:
    """Torchao's `int8`: the codes are multiplied, and the product is scaled afterwards."""
    scale = torch.clamp(weight.abs().amax(dim=1) / 127.5, min=SMALLEST_SCALE)
    codes = torch.clamp(torch.round(weight * (1.0 / scale)[:, None]), -128, 127)
    return QuantizedLinear(codes, Bias.AFTER, scale)


def _uint(weight: Tensor, bits: int) -> QuantizedLinear:
    """Torchao's `uint…`: groups of 64 whose range holds zero; a row that 64 does not divide is left as it is."""
    if weight.shape[1] % UINT_GROUP:
        return QuantizedLinear(weight, Bias.FUSED)
    grouped = weight.reshape(weight.shape[0], -1, UINT_GROUP)
    low = grouped.amin(dim=2, keepdim=True).clamp(max=0)
    high = grouped.amax(dim=2, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = torch.clamp((high - low) / float(top), min=SMALLEST_SCALE)
    zero = torch.clamp(-torch.round(low / scale), 0, top).to(torch.int32)
    codes = torch.clamp(torch.round(grouped * (1.0 / scale)) + zero, 0, top).to(torch.int32)
    return QuantizedLinear(((codes - zero).to(weight.dtype) * scale).reshape(weight.shape), Bias.FUSED)


def unquantized(weight: Tensor) -> QuantizedLinear:
    """The weight as it is: `model.quantize: false`, and what a quantizer leaves alone."""
    return QuantizedLinear(weight, Bias.FUSED)


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        quantizer.name: quantizer
        for quantizer in (
            Quantizer("qfloat8", lambda w: _rows(w, torch.float8_e4m3fn, 448)),
            Quantizer("qfloat8_e5m2", lambda w: _rows(w, torch.float8_e5m2, 57344)),
            Quantizer("qint8", lambda w: _rows(w, torch.int8, 127)),
            Quantizer("qint4", lambda w: _affine(w, 4)),
            Quantizer("qint2", lambda w: _affine(w, 2)),
            Quantizer("float8", reference_float8),
            Quantizer("int8", _int8),
            *(Quantizer(f"uint{bits}", lambda w, bits=bits: _uint(w, bits)) for bits in range(2, 8)),  # type: ignore[misc]
            Quantizer("uint8", unquantized),
        )
    }
)
"""By the config's name. The trainer's `uint8` quantizes nothing."""


def quantize_linear(weight: Tensor, qtype: str | None) -> QuantizedLinear:
    """A linear layer's weight as the trainer holds it.

    Args:
        weight: (out, in) in the trainer's dtype.
        qtype: the config's name of a quantizer; None leaves the weight as it is.

    Raises:
        KeyError: no quantizer has this name.
    """
    return unquantized(weight) if qtype is None else QUANTIZERS[qtype].quantize(weight)


def require_finite(finite: Mapping[str, Tensor], qtype: str | None) -> None:
    """Refuses weights that the trainer would turn into NaN: quanto divides a row of zeros by zero.

    One look at the device for all tensors, instead of one for each.

    Args:
        finite: by tensor name, whether every value was finite after quantization: () bool.
        qtype: the quantizer, for the message.

    Raises:
        WeightsInvalid: naming the tensors.
    """
    if not finite:
        return
    good = torch.stack(list(finite.values())).tolist()
    bad = [name for name, is_finite in zip(finite, good, strict=True) if not is_finite]
    if bad:
        raise WeightsInvalid(
            f"{first_named(bad, 3)}: has a row of zeros, which {qtype} turns into NaN"
            if qtype in ZEROS_BECOME_NAN
            else f"{first_named(bad, 3)}: has values that are not finite"
        )
