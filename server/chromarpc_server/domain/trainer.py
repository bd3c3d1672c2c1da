"""What a training config of ai-toolkit decides about the samples that it draws, as values. See docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PREVIEW_PROFILES = ("preview", "preview-exact")
"""Numerics profiles that draw the trainer's own picture."""
TRAINER_QTYPES = (
    "qfloat8",
    "qfloat8_e5m2",
    "qint8",
    "qint4",
    "qint2",
    "float8",
    "int8",
    *(f"uint{bits}" for bits in range(2, 9)),
)
"""The config's `qtype` values whose weights this server computes."""


class LokrForm(Enum):
    """How the trainer adds a LoKr."""

    FACTORIZED = "factorized"
    """Beside the layer, by its factors: since 2026-07-15."""
    WEIGHT = "weight"
    """To the dequantized weight, at every call: before."""


@dataclass(frozen=True)
class TrainerSettings:
    """Everything that the trainer's config decides, with the trainer's defaults filled in."""

    quantize: bool = True
    qtype: str = "qfloat8"
    quantize_te: bool = True
    dtype: str = "bfloat16"
    lokr_form: LokrForm = LokrForm.FACTORIZED


def trainer_size(side_px: int) -> int:
    """What the trainer makes of a width or height: floored to 8, at least 64, then floored to 16."""
    return max(64, side_px - side_px % 8) // 16 * 16
