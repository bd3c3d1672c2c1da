"""Finds what each sample of a run was drawn with: its settings, and the adapter that was saved at its step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from chromarpc.replay.run_folder import AdapterHeader, Ignored, RunFolder, SampleFile, Unreadable
from chromarpc.replay.settings import ARCHITECTURE, SampleSettings, TrainingRun

FLOAT32_DRAW_SINCE: Final = datetime(2026, 7, 27, tzinfo=UTC)
"""From then on ai-toolkit runs on torch 2.13, which draws bf16 noise as float32 and rounds it."""
FACTORIZED_LOKR_SINCE: Final = datetime(2026, 7, 15, tzinfo=UTC)
"""From then on ai-toolkit adds a LoKr by its factors."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample, and what it takes to draw it again."""

    file: SampleFile
    settings: SampleSettings | None
    """None where the config does not tell them."""
    checkpoint: str | None
    """Name of the adapter that was saved at this step, whether or not it is still there; None at step 0."""
    checkpoint_kept: bool
    reason: str | None
    """Why it cannot be drawn; None where it can."""

    @property
    def drawn_at(self) -> datetime | None:
        """When the trainer drew it, by its clock; None where that is no time."""
        try:
            return datetime.fromtimestamp(self.file.time_ms / 1000, UTC)
        except (OverflowError, OSError, ValueError):
            return None


@dataclass(frozen=True)
class Pairing:
    """All samples of a run, by step and index, and the files that are none."""

    rows: tuple[Row, ...]
    ignored: tuple[Ignored, ...]


def pair(run: TrainingRun, folder: RunFolder) -> Pairing:
    """Pairs a run's samples with its saved adapters.

    Raises:
        Unreadable: the folder holds too many files.
    """
    found = folder.samples()
    adapters = _Adapters(run, folder, max((sample.step for sample in found.samples), default=0))
    return Pairing(tuple(_row(sample, run, adapters) for sample in found.samples), found.ignored)


def _row(sample: SampleFile, run: TrainingRun, adapters: _Adapters) -> Row:
    settings = run.sample(sample.step, sample.index)
    checkpoint, kept, reason = adapters.of_step(sample.step)
    if settings is None:
        reason = f"the config has no sample {sample.index}: it was changed after this was drawn"
    elif isinstance(settings, str):
        reason = settings
    elif settings.seed is None:
        reason = "its seed was drawn at random (seed: -1), and the trainer writes it down nowhere"
    elif missing := _unresolved_names(settings, run):
        names = ", ".join(f"${{{name}}}" for name in missing)
        reason = f"its text holds {names}, which is replaced only by --allow-env {missing[0]}"
    return Row(
        file=sample,
        settings=settings if isinstance(settings, SampleSettings) else None,
        checkpoint=checkpoint,
        checkpoint_kept=kept,
        reason=reason,
    )


def _unresolved_names(settings: SampleSettings, run: TrainingRun) -> list[str]:
    texts = (settings.prompt, settings.negative_prompt)
    return [name for name in run.unresolved if any(f"${{{name}}}" in text for text in texts)]


class _Adapters:
    """The adapters that a run saved, by step."""

    def __init__(self, run: TrainingRun, folder: RunFolder, last_step: int) -> None:
        self._run = run
        self._folder = folder
        self._last_step = last_step
        self._present: Collection[str] = {name for name in folder.names() if name.endswith(".safetensors")}
        self._headers: dict[str, AdapterHeader | str] = {}
        self._answers: dict[int, tuple[str | None, bool, str | None]] = {}

    def of_step(self, step: int) -> tuple[str | None, bool, str | None]:
        """Name of the adapter of a step, whether it is there, and why it cannot be used."""
        if step not in self._answers:
            self._answers[step] = self._find(step)
        return self._answers[step]

    def _find(self, step: int) -> tuple[str | None, bool, str | None]:
        run = self._run
        if step == 0:
            started = (
                "the run went on from another adapter (network.pretrained_lora_path), which is not in its folder"
            )
            return None, False, started if run.pretrained else None
        if not run.network_type:
            return None, False, "the run trains the whole model, and no adapter"
        # The job's name may itself end like a step, so names are built, never taken apart.
        for name in (run.name, f"{run.name}_LoRA"):
            numbered, last = f"{name}_{step:09d}.safetensors", f"{name}.safetensors"
            for file in (numbered, last):
                if file in self._present:
                    header = self._header(file)
                    if isinstance(header, str):
                        if file == numbered or step == self._last_step:
                            return file, True, header
                    elif self._is_of(header, file == numbered, step):
                        return file, True, _foreign(file, header)
        return self._missing(step)

    def _is_of(self, header: AdapterHeader, numbered: bool, step: int) -> bool:
        if header.step is not None:
            return header.step == step
        return numbered or step == self._last_step

    def _missing(self, step: int) -> tuple[str | None, bool, str | None]:
        run = self._run
        numbered, last = f"{run.name}_{step:09d}.safetensors", f"{run.name}.safetensors"
        if numbered in self._present:  # else it would have been taken: it says that it is of another step
            header = self._header(numbered)
            says = header.step if isinstance(header, AdapterHeader) else None
            return numbered, True, f"{numbered} says that it was saved at step {says}"
        if step == run.total_steps and last not in self._present:
            return last, False, "checkpoint deleted: the run's last adapter is not in its folder"
        if run.save_every and step % run.save_every and step != run.total_steps:
            return None, False, f"no checkpoint was saved at this step (save_every: {run.save_every})"
        kept = f" (max_step_saves_to_keep: {run.saves_kept})" if run.saves_kept else ""
        return numbered, False, f"checkpoint deleted{kept}"

    def _header(self, name: str) -> AdapterHeader | str:
        if name not in self._headers:
            try:
                self._headers[name] = self._folder.adapter_header(name)
            except Unreadable as error:
                self._headers[name] = f"{error}"
        return self._headers[name]


def _foreign(file: str, header: AdapterHeader) -> str | None:
    base = header.base_model
    return None if base in ("", ARCHITECTURE) else f"{file} is an adapter of another model: {base[:40]!r}"
