"""Which noise draw a run's trainer had, and whether its base model is the same: samples without adapter tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chromarpc.events import NoiseDraw

DRAWS: Final[tuple[NoiseDraw, NoiseDraw]] = ("float32", "legacy")
MATCH_DB: Final = 30.0
"""From here on a picture is the same one."""
ROUGH_MATCH_DB: Final = 20.0
CLEAR_MARGIN_DB: Final = 8.0
"""How much closer the right draw is than the other, where other things differ as well."""
DECIDING_MARGIN_DB: Final = 3.0
"""Small or plain pictures may be alike in both draws; then another one is tried."""
MOST_TRIED: Final = 3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One sample, drawn with both noise draws."""

    step: int
    index: int
    psnr_db: dict[NoiseDraw, float]
    """Of what could be drawn."""

    @property
    def best(self) -> NoiseDraw | None:
        """The closer draw."""
        return max(self.psnr_db.items(), key=lambda one: one[1])[0] if self.psnr_db else None

    @property
    def margin_db(self) -> float:
        """How much closer the closer draw is than the other; 0 where only one could be drawn."""
        values = sorted(self.psnr_db.values())
        return values[-1] - values[0] if len(values) > 1 else 0.0

    @property
    def matches(self) -> bool:
        """Whether the closer draw is the trainer's picture."""
        closest = max(self.psnr_db.values(), default=0.0)
        return closest >= MATCH_DB or (closest >= ROUGH_MATCH_DB and self.margin_db >= CLEAR_MARGIN_DB)

    @property
    def decides(self) -> bool:
        """Whether no other sample has to be tried."""
        return self.matches and self.margin_db >= DECIDING_MARGIN_DB


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the trials say."""

    trials: tuple[Trial, ...]
    noise_draw: NoiseDraw
    """The one that matches; without one, what the date of the samples suggests."""
    matches: bool | None
    """None where nothing could be tried."""
    with_adapter: bool
    """Whether only samples with an adapter could be tried."""

    @property
    def sentence(self) -> str:
        """The result, for people."""
        if self.matches is None:
            return f"No sample could be tried: the noise draw ({self.noise_draw}) is taken from the samples' date."
        trial = max(self.trials, key=lambda one: (one.matches, one.margin_db if one.matches else _closest(one)))
        measured = ", ".join(f"{draw} {value:.1f} dB" for draw, value in sorted(trial.psnr_db.items()))
        where = f"sample {trial.index} of step {trial.step}: {measured}"
        if self.matches:
            return f"The noise draw is {self.noise_draw} ({where})."
        if self.with_adapter:
            return f"Neither noise draw gives the trainer's picture ({where}): base, settings or adapter differ."
        return (
            f"Neither noise draw gives the trainer's picture of step 0, where there is no adapter yet ({where}): "
            "the base model or the settings differ, not the LoRA."
        )


def _closest(trial: Trial) -> float:
    return max(trial.psnr_db.values(), default=0.0)


def judge(trials: Sequence[Trial], *, likely: NoiseDraw, with_adapter: bool) -> Calibration:
    """The result of trials, the last of which ended them."""
    tried = [trial for trial in trials if trial.psnr_db]
    if not tried:
        return Calibration(trials=tuple(trials), noise_draw=likely, matches=None, with_adapter=with_adapter)
    matching = max((trial for trial in tried if trial.matches), key=lambda trial: trial.margin_db, default=None)
    draw = matching.best if matching is not None else None
    return Calibration(
        trials=tuple(trials), noise_draw=draw or likely, matches=matching is not None, with_adapter=with_adapter
    )
