"""One replay from the folder to the results: resolves, calibrates, draws, compares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from chromarpc.client import Client
from chromarpc.events import Event, LokrForm, NoiseDraw, TrainerOptions
from chromarpc.replay.calibration import DRAWS, MOST_TRIED, Calibration, Trial, judge
from chromarpc.replay.config_file import ConfigError, read_config
from chromarpc.replay.drawing import Adapter, Artist, Drawing, Drawn, Failed, Outcome, Pictures
from chromarpc.replay.pairing import FACTORIZED_LOKR_SINCE, FLOAT32_DRAW_SINCE, Pairing, Row, pair
from chromarpc.replay.run_folder import MAX_PICTURE_BYTES, Ignored, RunFolder, Unreadable
from chromarpc.replay.serving import Server, Unusable, choose
from chromarpc.replay.settings import TrainingRun, resolve_run
from chromarpc.replay.similarity import NoPicture, Similarity, compare, decode

IN_FLIGHT: Final = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the person asks for."""

    out: Path
    model: str | None = None
    profile: str | None = None
    steps: frozenset[int] | None = None
    """Only these; all where None."""
    samples: frozenset[int] | None = None
    min_psnr_db: float = 30.0
    noise_draw: NoiseDraw | None = None
    """Taken without a calibration."""
    in_flight: int = IN_FLIGHT
    draw_anyway: bool = False
    """Whether to draw all although the calibration matched nothing."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What `${NAME}` may be replaced by."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A sample beside its redrawing."""

    row: Row
    readable: bool
    """Whether the trainer's file is a picture."""
    theirs_sha256: str | None
    """Of the trainer's file, hexadecimal; None where it cannot be read."""
    noise_draw: NoiseDraw
    lokr_form: LokrForm | None
    adapter_sha256: str | None = None
    drawn: Drawn | None = None
    similarity: Similarity | None = None
    reason: str | None = None
    """Why there is no picture of ours beside the trainer's; None where there is."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """All that a report tells."""

    run: TrainingRun
    server: Server
    results: tuple[Result, ...]
    ignored: tuple[Ignored, ...]
    left_out: int
    """Samples that were not asked for."""
    calibration: Calibration | None
    assumptions: tuple[str, ...]
    min_psnr_db: float


class Watcher(Protocol):
    """Sees a replay go on."""

    def say(self, text: str) -> None:
        """A line."""
        ...

    def started(self, total: int) -> None:
        """So many samples are to be drawn."""
        ...

    def event(self, drawing: Drawing, event: Event) -> None:
        """Something happened to a drawing; from any thread."""
        ...

    def ended(self, result: Result) -> None:
        """A sample is done."""
        ...


def replay(client: Client, folder: RunFolder, options: Options, watcher: Watcher) -> Replayed:
    """Draws a run's samples again and compares them with the trainer's.

    Raises:
        Unusable: nothing can be drawn; nothing was written.
        ChromarpcError: the server cannot be asked.
        OSError: the folder of the report cannot be written.
    """
    try:
        name, content = folder.config()
        run = resolve_run(read_config(content, name, environment=options.environment))
        pairing = pair(run, folder)
    except (ConfigError, Unreadable) as error:
        raise Unusable(f"{error}") from None
    if not pairing.rows:
        raise Unusable("there is no sample of ai-toolkit in the folder's `samples`")
    return _Session(client, folder, run, pairing, options, watcher).replay()


class _Session:
    def __init__(
        self,
        client: Client,
        folder: RunFolder,
        run: TrainingRun,
        pairing: Pairing,
        options: Options,
        watcher: Watcher,
    ) -> None:
        self._folder = folder
        self._run = run
        self._pairing = pairing
        self._options = options
        self._watcher = watcher
        self._assumptions = list(run.assumptions)
        self._server, in_flight = choose(
            client,
            run,
            model=options.model,
            profile=options.profile,
            in_flight=options.in_flight,
            assumptions=self._assumptions,
        )
        self._pictures = Pictures(options.out)
        self._artist = Artist(
            client,
            folder,
            self._pictures,
            server=self._server.identity,
            in_flight=in_flight,
            tell=watcher.say,
        )
        self._hashes: dict[str, str | Unreadable] = {}

    def replay(self) -> Replayed:
        rows = self._pairing.rows
        asked = [row for row in rows if _asked(row, self._options)]
        results = {_key(row): self._begin(row) for row in rows}
        for ignored in self._pairing.ignored:
            self._watcher.say(f"{ignored.name}: {ignored.reason}")
        wanted = any(results[_key(row)].reason is None for row in asked)
        calibration = self._calibrate([results[_key(row)] for row in rows]) if wanted else None
        if calibration is not None:
            self._watcher.say(calibration.sentence)
            self._assumptions += _eras(calibration, asked, self._run)
        for row in asked:
            results[_key(row)] = self._with_era(results[_key(row)], calibration)
        stopped = calibration is not None and calibration.matches is False and not self._options.draw_anyway
        if stopped and calibration is not None:
            self._watcher.say("The other samples are not drawn; --anyway draws them all the same.")
            tried = {(trial.step, trial.index) for trial in calibration.trials}
            differs = "base, settings or adapter differ" if calibration.with_adapter else "base or settings differ"
            for row in asked:
                if results[_key(row)].reason is None and _key(row) not in tried:
                    reason = f"{differs} (neither noise draw gives the trainer's picture where both were tried)"
                    results[_key(row)] = replace(results[_key(row)], reason=reason)
        self._draw([results[_key(row)] for row in asked if results[_key(row)].reason is None], results)
        return Replayed(
            run=self._run,
            server=self._server,
            results=tuple(results[_key(row)] for row in asked),
            ignored=self._pairing.ignored,
            left_out=len(rows) - len(asked),
            calibration=calibration,
            assumptions=tuple(dict.fromkeys(self._assumptions)),
            min_psnr_db=self._options.min_psnr_db,
        )

    def _begin(self, row: Row) -> Result:
        """A sample with the trainer's picture, checked; nothing is drawn yet."""
        result = Result(
            row=row,
            readable=False,
            theirs_sha256=None,
            noise_draw=_likely(row),
            lokr_form=None,
            reason=row.reason,
        )
        try:
            theirs = self._folder.read(row.file.name, MAX_PICTURE_BYTES)
        except Unreadable as error:
            return replace(result, reason=f"{error}")
        try:
            size = decode(theirs).size
        except NoPicture as error:
            return replace(result, reason=f"the trainer's file {error}")
        result = replace(result, readable=True, theirs_sha256=hashlib.sha256(theirs).hexdigest())
        settings = row.settings
        if result.reason is None and settings is not None and size != (settings.width, settings.height):
            said = f"{settings.width}×{settings.height}"
            reason = f"it has {size[0]}×{size[1]} pixels and the config says {said}: the config was changed since"
            return replace(result, reason=reason)
        if result.reason is None and row.checkpoint is not None:
            sha256 = self._sha256(row.checkpoint)
            if isinstance(sha256, Unreadable):
                return replace(result, reason=f"{sha256}")
            return replace(result, adapter_sha256=sha256)
        return result

    def _sha256(self, name: str) -> str | Unreadable:
        if name not in self._hashes:
            try:
                self._hashes[name] = self._folder.sha256(name)
            except Unreadable as error:
                self._hashes[name] = error
        return self._hashes[name]

    def _calibrate(self, results: Sequence[Result]) -> Calibration | None:
        """Draws samples of step 0 with both draws until one matches; without any, those of the first adapter."""
        if self._options.noise_draw is not None:
            return None
        drawable = [result for result in results if result.reason is None]
        if not drawable:
            return None
        first_step = min(result.row.file.step for result in drawable)
        candidates = sorted((r for r in drawable if r.row.file.step == first_step), key=_work)[:MOST_TRIED]
        likely = _likely(candidates[0].row)
        self._watcher.say("calibrating: which noise draw is the trainer's, and is the base model the same?")
        trials: list[Trial] = []
        for candidate in candidates:
            measured: dict[NoiseDraw, float] = {}

            def ended(
                drawing: Drawing,
                outcome: Outcome,
                shown: Result = candidate,
                to: dict[NoiseDraw, float] = measured,
            ) -> None:
                done = self._compared(shown, outcome)
                if done.similarity is not None:
                    to[drawing.noise_draw] = done.similarity.psnr_db

            both = [self._drawing(self._in_era(candidate, draw)) for draw in DRAWS]
            self._artist.draw_all(both, on_event=self._watcher.event, on_outcome=ended)
            trials.append(Trial(step=candidate.row.file.step, index=candidate.row.file.index, psnr_db=measured))
            if trials[-1].decides:
                break
        return judge(trials, likely=likely, with_adapter=first_step > 0)

    def _with_era(self, result: Result, calibration: Calibration | None) -> Result:
        """The sample with its noise draw: the calibrated one, unless the trainer was renewed since."""
        if calibration is None:
            return self._in_era(result, self._options.noise_draw or _likely(result.row))
        tried = next(
            (r for r in self._pairing.rows if _key(r) in {(t.step, t.index) for t in calibration.trials}), None
        )
        draw = calibration.noise_draw
        if calibration.matches and tried is not None and draw == "legacy" and _likely(tried) == "legacy":
            draw = _likely(result.row)
        return self._in_era(result, draw)

    def _in_era(self, result: Result, draw: NoiseDraw) -> Result:
        form: LokrForm | None = None
        if self._run.network_type == "lokr":
            drawn_at = result.row.drawn_at
            new = draw == "float32" or (drawn_at is not None and drawn_at >= FACTORIZED_LOKR_SINCE)
            form = "factorized" if new else "weight"
        return replace(result, noise_draw=draw, lokr_form=form)

    def _drawing(self, result: Result) -> Drawing:
        settings, file = result.row.settings, result.row.file
        seed = None if settings is None else settings.request_seed
        if settings is None or seed is None:
            raise AssertionError("a sample that cannot be drawn")
        adapter = None
        if result.row.checkpoint is not None and result.adapter_sha256 is not None:
            adapter = Adapter(
                name=result.row.checkpoint,
                sha256=result.adapter_sha256,
                network_multiplier=settings.network_multiplier,
            )
        trainer = self._run.trainer
        return Drawing(
            step=file.step,
            index=file.index,
            model=self._server.model,
            profile=self._server.profile,
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt,
            width=settings.requested_width,
            height=settings.requested_height,
            seed=seed,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            adapter=adapter,
            trainer=TrainerOptions(
                quantize=trainer.quantize,
                qtype=trainer.qtype,
                quantize_te=trainer.quantize_te,
                dtype=trainer.dtype,
                lokr_form=result.lokr_form,
            ),
            noise_draw=result.noise_draw,
            suffix=file.name.rpartition(".")[2],
        )

    def _draw(self, wanted: Sequence[Result], results: dict[tuple[int, int], Result]) -> None:
        self._watcher.started(len(wanted))
        by_drawing = {(result.row.file.step, result.row.file.index): result for result in wanted}

        def ended(drawing: Drawing, outcome: Outcome) -> None:
            key = (drawing.step, drawing.index)
            results[key] = self._compared(by_drawing[key], outcome)
            self._watcher.ended(results[key])

        drawings = [self._drawing(result) for result in wanted]
        self._artist.draw_all(drawings, on_event=self._watcher.event, on_outcome=ended)

    def _compared(self, result: Result, outcome: Outcome) -> Result:
        if isinstance(outcome, Failed):
            return replace(result, reason=outcome.reason)
        try:
            theirs = self._folder.read(result.row.file.name, MAX_PICTURE_BYTES)
            similarity = compare(self._pictures.read(outcome), theirs)
        except Unreadable as error:
            return replace(result, reason=f"{error}")
        except NoPicture as error:
            return replace(result, reason=f"what the server drew {error}")
        except ValueError as error:
            return replace(result, reason=f"the server drew another size: {error}")
        return replace(result, drawn=outcome, similarity=similarity)


def _eras(calibration: Calibration, rows: Sequence[Row], run: TrainingRun) -> list[str]:
    said = [calibration.sentence]
    if run.network_type == "lokr":
        said.append(
            f"LoKr: by its factors for samples of {FACTORIZED_LOKR_SINCE:%Y-%m-%d} or later and for today's "
            "noise; before, added to the weight."
        )
    if calibration.noise_draw == "legacy" and any(_likely(row) == "float32" for row in rows):
        said.append(f"Samples of {FLOAT32_DRAW_SINCE:%Y-%m-%d} or later may be of a newer trainer than step 0.")
    return said


def _likely(row: Row) -> NoiseDraw:
    """The noise draw that the date of a sample suggests."""
    drawn_at = row.drawn_at
    return "legacy" if drawn_at is not None and drawn_at < FLOAT32_DRAW_SINCE else "float32"


def _asked(row: Row, options: Options) -> bool:
    return (options.steps is None or row.file.step in options.steps) and (
        options.samples is None or row.file.index in options.samples
    )


def _key(row: Row) -> tuple[int, int]:
    return row.file.step, row.file.index


def _work(result: Result) -> tuple[int, int]:
    settings = result.row.settings
    return (settings.width * settings.height * settings.steps if settings else 0), result.row.file.index
