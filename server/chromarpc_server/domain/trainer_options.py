"""The trainer's config, as a request gives it, with every default filled in."""

from __future__ import annotations

from chromarpc_server.domain.findings import Findings
from chromarpc_server.domain.requests import TrainerRequest
from chromarpc_server.domain.trainer import (
    PREVIEW_PROFILES,
    TRAINER_DTYPES,
    TRAINER_QTYPES,
    UNSUPPORTED_DTYPES,
    UNSUPPORTED_QTYPES,
    TrainerSettings,
)
from chromarpc_server.domain.warning_codes import WarningCode


def resolve_trainer(asked: TrainerRequest | None, profile: str, found: Findings) -> TrainerSettings | None:
    """What the config decides in the request's profile; None where that takes none of it.

    Args:
        asked: what the request says; None if nothing.
        profile: the request's numerics profile.
        found: collects what cannot be honoured, and what has no effect.
    """
    if profile not in PREVIEW_PROFILES:
        if asked is not None:
            found.warn(
                WarningCode.TRAINER_OPTIONS_IGNORED,
                "trainer",
                f"the profile {profile} does not draw as the trainer does, so this has no effect",
            )
        return None
    asked, default = asked or TrainerRequest(), TrainerSettings()
    quantize = default.quantize if asked.quantize is None else asked.quantize
    quantize_te = quantize if asked.quantize_te is None else asked.quantize_te
    is_quantized = quantize or quantize_te
    if asked.qtype and not is_quantized:
        found.warn(
            WarningCode.TRAINER_OPTIONS_IGNORED, "trainer.qtype", "nothing is quantized, so this has no effect"
        )
    if asked.lokr_form not in (None, default.lokr_form) and not quantize:
        found.warn(
            WarningCode.TRAINER_OPTIONS_IGNORED,
            "trainer.lokr_form",
            "the transformer is not quantized, so adapters are merged and this has no effect",
        )
    return TrainerSettings(
        quantize=quantize,
        qtype=_qtype(asked.qtype, found) if asked.qtype and is_quantized else default.qtype,
        quantize_te=quantize_te,
        dtype=_dtype(asked.dtype, found) if asked.dtype else default.dtype,
        lokr_form=asked.lokr_form or default.lokr_form,
    )


def _qtype(name: str, found: Findings) -> str:
    if name in TRAINER_QTYPES:
        return name
    if name.startswith(UNSUPPORTED_QTYPES):
        found.refuse("trainer.qtype", f"{name[:64]!r} is known, and not built")
    elif "|" in name:
        found.refuse("trainer.qtype", "adapters that recover accuracy (after the |) are known, and not built")
    else:
        known = ", ".join(TRAINER_QTYPES)
        found.refuse("trainer.qtype", f"no such quantizer: {name[:64]!r}; known are {known}")
    return TrainerSettings.qtype


def _dtype(name: str, found: Findings) -> str:
    if name in UNSUPPORTED_DTYPES:
        found.refuse("trainer.dtype", f"{name!r} is known, and not built")
    elif name not in TRAINER_DTYPES:
        known = ", ".join(TRAINER_DTYPES)
        found.refuse("trainer.dtype", f"no such type: {name[:64]!r}; known are {known}")
    return TRAINER_DTYPES.get(name, TrainerSettings.dtype)
