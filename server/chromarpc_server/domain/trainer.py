"""What ai-toolkit's training config decides about the samples it draws: names, defaults, and what is not built.

Only the preview profiles, which draw the trainer's own image, take any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

PREVIEW_PROFILES = frozenset({"preview-exact", "preview"})
"""Names of the numerics profiles that draw the trainer's own image."""

TRAINER_QTYPES = (
    "qfloat8",
    "qfloat8_e5m2",
    "qint8",
    "qint4",
    "qint2",
    "float8",
    "int8",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "uint8",
)
"""Quantizers, as `model.qtype` names them."""

UNSUPPORTED_QTYPES = ("convrot", "nvfp4", "orbit")
"""How the names begin of quantizers that the trainer has and this service does not."""

TRAINER_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bf16": "bfloat16",
        "bfloat16": "bfloat16",
        "float32": "float32",
        "fp32": "float32",
        "float": "float32",
        "single": "float32",
    }
)
"""Spellings of `train.dtype`, and what each one means."""

UNSUPPORTED_DTYPES = ("fp16", "float16", "half")
"""Those that the trainer has and this service does not."""

SIZE_MULTIPLE = 16
"""Widths and heights are floored to 8, raised to `MIN_SIZE_PX`, and floored to this."""
MIN_SIZE_PX = 64
TRAINER_SIZES = (1, 4096)
"""Widths and heights that may be asked for, in pixels, both ends included."""


class LokrForm(StrEnum):
    """How a LoKr is added to the weights it changes."""

    FACTORIZED = "factorized"
    """Beside the product, by its factors: since 2026-07-15."""
    WEIGHT = "weight"
    """To the dequantized weight, at every call: before."""


@dataclass(frozen=True)
class TrainerSettings:
    """The config's part in an image, with nothing left open."""

    quantize: bool = True
    """`model.quantize`: whether the transformer is quantized."""
    qtype: str = "qfloat8"
    """`model.qtype`, one of `TRAINER_QTYPES`."""
    quantize_te: bool = True
    """`model.quantize_te`: whether the text encoder is quantized, with the same `qtype`."""
    dtype: str = "bfloat16"
    """`train.dtype`: `bfloat16` or `float32`."""
    lokr_form: LokrForm = LokrForm.FACTORIZED


def trainer_size(asked: int) -> int:
    """A width or height as the trainer draws it, in pixels: `max(64, n − n mod 8)`, floored to 16."""
    return max(MIN_SIZE_PX, asked - asked % 8) // SIZE_MULTIPLE * SIZE_MULTIPLE
