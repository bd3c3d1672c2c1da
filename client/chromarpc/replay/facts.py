"""The facts of a replay as JSON values: `report.json`, and what the page is made of."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

from chromarpc.replay.session import Replayed, Result
from chromarpc.version import __version__

FORMAT: Final = "chromarpc-replay"
FORMAT_VERSION: Final = 1
EYE_DB: Final = 40.0
"""From here on hardly anybody sees a difference."""
_LOCAL_PATH: Final = re.compile(r"[/\\~]|[A-Za-z]:[\\/]|.*\\")


class Verdict(IntEnum):
    """How a replay ended, as the shell sees it."""

    ALIKE = 0
    BELOW = 7
    NOTHING_DRAWN = 8


def verdict(facts: dict[str, Any]) -> Verdict:
    """The exit code of a replay."""
    summary = facts["summary"]
    if not summary["drawn"]:
        return Verdict.NOTHING_DRAWN
    return Verdict.BELOW if summary["below_min_psnr"] else Verdict.ALIKE


def facts_of(replayed: Replayed) -> dict[str, Any]:
    """Everything that the report tells, without paths, hosts and times."""
    run, server, calibration = replayed.run, replayed.server, replayed.calibration
    prepared = next((result.drawn for result in replayed.results if result.drawn), None)
    draws = sorted({result.noise_draw for result in replayed.results if result.drawn})
    forms = sorted({result.lokr_form for result in replayed.results if result.drawn and result.lokr_form})
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "client_version": __version__,
        "summary": _summary(replayed),
        "run": {
            "name": run.name,
            "base_model": _without_path(run.base_model),
            "network_type": run.network_type,
            "sample_every": run.sample_every,
            "save_every": run.save_every,
            "total_steps": run.total_steps,
        },
        "resolved": {
            "quantize": run.trainer.quantize,
            "qtype": run.trainer.qtype,
            "quantize_te": run.trainer.quantize_te,
            "dtype": run.trainer.dtype,
            "noise_draws": draws,
            "lokr_forms": forms,
            "unresolved": list(run.unresolved),
        },
        "server": {
            "version": server.version,
            "device": prepared.device if prepared else server.device,
            "model": server.model,
            "served_model": server.served_model,
            "base_checkpoint": server.base_checkpoint,
            "model_revision": prepared.model_revision if prepared else "",
            "profile": server.profile,
            "versions": dict(prepared.versions) if prepared else {},
        },
        "calibration": None
        if calibration is None
        else {
            "sentence": calibration.sentence,
            "noise_draw": calibration.noise_draw,
            "matches": calibration.matches,
            "trials": [
                {"step": t.step, "index": t.index, "psnr_db": {k: round(v, 2) for k, v in t.psnr_db.items()}}
                for t in calibration.trials
            ],
        },
        "assumptions": list(replayed.assumptions),
        "curve": _curve(replayed.results),
        "ignored": [{"file": ignored.name, "reason": ignored.reason} for ignored in replayed.ignored],
        "samples": [_sample(result, replayed) for result in replayed.results],
    }


def _summary(replayed: Replayed) -> dict[str, Any]:
    results = replayed.results
    drawn = [result for result in results if result.similarity is not None]
    missing = Counter(_short(result.reason) for result in results if result.similarity is None)
    values = [result.similarity.psnr_db for result in drawn if result.similarity]
    ssims = [result.similarity.ssim for result in drawn if result.similarity]
    identical = sum(1 for result in drawn if result.similarity and result.similarity.identical)
    below = sum(1 for value in values if value < replayed.min_psnr_db)
    summary: dict[str, Any] = {
        "samples": len(results),
        "drawn": len(drawn),
        "not_drawn": len(results) - len(drawn),
        "reasons": dict(missing.most_common()),
        "identical": identical,
        "below_min_psnr": below,
        "min_psnr_db": replayed.min_psnr_db,
        "median_psnr_db": round(statistics.median_low(values), 2) if values else None,
        "lowest_psnr_db": round(min(values), 2) if values else None,
        "median_ssim": round(statistics.median_low(ssims), 4) if ssims else None,
        "not_asked_for": replayed.left_out,
    }
    return {"line": count_line(summary), "verdict": verdict_line(summary)} | summary


def count_line(summary: dict[str, Any]) -> str:
    """What was drawn, what was not, and why."""
    total, drawn, missing = summary["samples"], summary["drawn"], summary["not_drawn"]
    noun = "sample" if total == 1 else "samples"
    line = f"{drawn} of {total} {noun} drawn again"
    if missing:
        several = len(summary["reasons"]) > 1
        reasons = [f"{count} {reason}" if several else reason for reason, count in summary["reasons"].items()]
        line += f"; {missing} not: {', '.join(reasons)}"
    if summary["not_asked_for"]:
        line += f"; {summary['not_asked_for']} not asked for"
    return f"{line}."


def verdict_line(summary: dict[str, Any]) -> str:
    """How alike they are, for a stranger."""
    drawn, identical, below = summary["drawn"], summary["identical"], summary["below_min_psnr"]
    if not drawn:
        return "No sample could be drawn again."
    if identical == drawn:
        every = "Every picture is" if drawn > 1 else "The picture is"
        return f"{every} the trainer's own, byte for byte."
    parts = [f"{identical} identical to the trainer's file, byte for byte"] if identical else []
    parts.append(f"median {_db(summary['median_psnr_db'])}, lowest {_db(summary['lowest_psnr_db'])}")
    limit = f"{summary['min_psnr_db']:g} dB"
    parts.append(f"{below} below {limit}" if below else f"none below {limit}")
    lowest = summary["lowest_psnr_db"]
    seen = (
        "Some differ visibly"
        if below
        else "The same to the eye"
        if lowest >= EYE_DB
        else "Alike, with small differences"
    )
    return f"{seen}: {'; '.join(parts)}."


def _db(value: float) -> str:
    return "identical pixels" if value >= 100 else f"{value:.1f} dB"


def _curve(results: Sequence[Result]) -> list[dict[str, Any]]:
    steps: dict[int, list[float]] = {}
    for result in results:
        if result.similarity is not None:
            steps.setdefault(result.row.file.step, []).append(result.similarity.psnr_db)
    return [
        {
            "step": step,
            "drawn": len(values),
            "median_psnr_db": round(statistics.median_low(values), 2),
            "lowest_psnr_db": round(min(values), 2),
        }
        for step, values in sorted(steps.items())
    ]


def _sample(result: Result, replayed: Replayed) -> dict[str, Any]:
    row, settings, similarity, drawn = result.row, result.row.settings, result.similarity, result.drawn
    trainer = replayed.run.trainer
    facts: dict[str, Any] = {
        "step": row.file.step,
        "index": row.file.index,
        "file": row.file.name,
        "identical": similarity.identical if similarity else False,
        "same_pixels": similarity.same_pixels if similarity else False,
        "psnr_db": round(similarity.psnr_db, 2) if similarity else None,
        "ssim": round(similarity.ssim, 5) if similarity else None,
        "largest_difference": similarity.largest_difference if similarity else None,
        "below_min_psnr": similarity is not None and similarity.psnr_db < replayed.min_psnr_db,
        "reason": result.reason,
        "checkpoint": row.checkpoint,
        "checkpoint_kept": row.checkpoint_kept,
        "checkpoint_sha256": result.adapter_sha256,
        "trainer_sha256": result.theirs_sha256,
        "trainer_readable": result.readable,
        "picture": drawn.file if drawn else None,
        "picture_sha256": drawn.sha256 if drawn else None,
        "seconds": round(drawn.seconds, 2) if drawn else None,
        "warnings": list(drawn.warnings) if drawn else [],
        "resolved": None,
    }
    if settings is not None:
        facts["resolved"] = {
            "prompt": settings.prompt,
            "negative_prompt": settings.negative_prompt,
            "requested": [settings.requested_width, settings.requested_height],
            "width": settings.width,
            "height": settings.height,
            "seed": settings.seed,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "network_multiplier": settings.network_multiplier,
            "quantize": trainer.quantize,
            "qtype": trainer.qtype,
            "quantize_te": trainer.quantize_te,
            "dtype": trainer.dtype,
            "noise_draw": result.noise_draw,
            "lokr_form": result.lokr_form,
        }
    return facts


def _short(reason: str | None) -> str:
    """A reason without its details, so that equal ones are counted together."""
    text = re.split(r" \(|: |; ", reason or "not drawn", maxsplit=1)[0]
    return text if len(text) <= 80 else f"{text[:79]}…"


def _without_path(name: str) -> str:
    """A model's name without what tells of somebody's disk."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if _LOCAL_PATH.match(name) else name
