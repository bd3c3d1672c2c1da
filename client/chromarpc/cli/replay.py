"""`chromarpc replay`: a training run's samples beside the same drawn again."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from chromarpc.cli.connection import with_client
from chromarpc.cli.exits import ExitCode, UsageError, printable, say
from chromarpc.client import Client
from chromarpc.errors import ChromarpcError
from chromarpc.events import Event, Loading, NoiseDraw, Queued, Step

if TYPE_CHECKING:
    from chromarpc.replay.drawing import Drawing
    from chromarpc.replay.session import Result

REPLAY_EXAMPLES = """\b
Examples:
  chromarpc replay output/my_lora
  chromarpc replay output/my_lora --steps 250,500 --samples 0,3 --min-psnr 40 --out report/
"""


@with_client
def replay(
    client: Client,
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="What ai-toolkit left: config.yaml, samples, adapters.")
    ],
    *,
    model: Annotated[
        str | None, typer.Option(help="Model id; the one that the config names, or chroma, when left out.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="preview when left out, or preview-exact.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Only samples of these steps of the training.")
    ] = None,
    samples: Annotated[str | None, typer.Option(metavar="N,N,…", help="Only samples of these indices.")] = None,
    min_psnr: Annotated[
        float, typer.Option(min=0, max=100, help="Decibels below which a sample counts as another picture.")
    ] = 30.0,
    out: Annotated[Path, typer.Option(help="Folder of the report; what it holds is taken up again.")] = Path(
        "report"
    ),
    noise_draw: Annotated[
        str | None, typer.Option(metavar="float32|legacy", help="Take this noise draw instead of trying both.")
    ] = None,
    allow_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Replace ${NAME} in the config from the environment.")
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=8, help="Samples asked for at once.")] = 4,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Draw all samples although neither noise draw matches.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Draw a training run's samples again, and report how alike they are.

    Nothing outside RUN_FOLDER is read. The report is OUT/index.html, to look at and to send, and OUT/report.json
    with the same facts. Started again after an interruption, it draws only what is missing.
    """
    # What a report takes is loaded only here: other commands shall start at once.
    from chromarpc.replay.drawing import Interrupted  # noqa: PLC0415
    from chromarpc.replay.facts import facts_of, verdict  # noqa: PLC0415
    from chromarpc.replay.report_page import write_report  # noqa: PLC0415
    from chromarpc.replay.run_folder import MAX_PICTURE_BYTES, RunFolder  # noqa: PLC0415
    from chromarpc.replay.serving import Unusable  # noqa: PLC0415
    from chromarpc.replay.session import Options  # noqa: PLC0415
    from chromarpc.replay.session import replay as replayed_of  # noqa: PLC0415

    options = Options(
        out=out,
        model=model,
        profile=profile,
        steps=_numbers(steps, "--steps"),
        samples=_numbers(samples, "--samples"),
        min_psnr_db=min_psnr,
        noise_draw=_noise_draw(noise_draw),
        in_flight=in_flight,
        draw_anyway=anyway,
        environment=_environment(allow_env or []),
    )
    try:
        folder = RunFolder(run_folder)
    except OSError as error:
        raise UsageError(f"{run_folder}: {error.strerror}") from None
    with folder, _watcher(quiet=quiet) as watcher:
        try:
            replayed = replayed_of(client, folder, options, watcher)
        except Unusable as error:
            say(f"error: {error}")
            raise typer.Exit(ExitCode.NOTHING_DRAWN) from None
        except Interrupted:
            say(f"interrupted; what was drawn is kept in {out}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except ChromarpcError:
            if out.is_dir():
                say(f"What was drawn is kept in {out}; the same command goes on from there.")
            raise
        facts = facts_of(replayed)
        page = write_report(facts, out, theirs=lambda name: folder.read(name, MAX_PICTURE_BYTES))
    say(facts["summary"]["line"])
    say(facts["summary"]["verdict"])
    typer.echo(str(page))
    if code := verdict(facts):
        raise typer.Exit(code)


def _numbers(text: str | None, option: str) -> frozenset[int] | None:
    if text is None:
        return None
    try:
        return frozenset(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: say whole numbers with commas between them") from None


def _noise_draw(text: str | None) -> NoiseDraw | None:
    match text:
        case None | "float32" | "legacy":
            return text
        case _:
            raise UsageError(f"--noise-draw {text}: say float32 or legacy")


def _environment(names: list[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UsageError(f"--allow-env {missing[0]}: there is no such variable")
    return {name: os.environ[name] for name in names}


def _watcher(*, quiet: bool) -> _Lines | _Bars:
    return _Bars() if sys.stderr.isatty() and not quiet else _Lines(quiet=quiet)


class _Lines:
    """A line for each sample."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._total = self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._quiet:
            say(text)

    def started(self, total: int) -> None:
        """So many samples are to be drawn."""
        self._total = total

    def event(self, drawing: Drawing, event: Event) -> None:
        """Too much for lines."""

    def ended(self, result: Result) -> None:
        """A sample is done."""
        self._done += 1
        self.say(f"{self._done}/{self._total} {result_text(result)}")


class _Bars(_Lines):
    """One bar for all samples and one for each that is being drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._tasks: dict[tuple[int, int], TaskID] = {}
        self._all: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line for people, above the bars."""
        self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def started(self, total: int) -> None:
        """So many samples are to be drawn."""
        super().started(total)
        with self._lock:
            self._forget_tasks()
            self._all = self._progress.add_task("samples", total=total)

    def event(self, drawing: Drawing, event: Event) -> None:
        """Moves a sample's bar."""
        if not isinstance(event, Queued | Loading | Step):
            return
        key = (drawing.step, drawing.index)
        name = f"step {drawing.step}, sample {drawing.index}"
        with self._lock:
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(name, total=drawing.steps)
            match event:
                case Queued():
                    self._progress.update(self._tasks[key], description=f"{name} waits")
                case Loading():
                    self._progress.update(self._tasks[key], description=f"{name} {event.stage}")
                case Step():
                    self._progress.update(self._tasks[key], description=name, completed=event.step)

    def ended(self, result: Result) -> None:
        """A sample is done."""
        with self._lock:
            task = self._tasks.pop((result.row.file.step, result.row.file.index), None)
            if task is not None:
                self._progress.remove_task(task)
            if self._all is not None:
                self._progress.advance(self._all)
        super().ended(result)

    def _forget_tasks(self) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()


def result_text(result: Result) -> str:
    """A sample as a line."""
    file, similarity = result.row.file, result.similarity
    name = f"step {file.step}, sample {file.index}"
    if similarity is None:
        return f"{name}: not drawn: {result.reason}"
    if similarity.identical:
        return f"{name}: identical"
    if similarity.same_pixels:
        return f"{name}: same pixels"
    return f"{name}: {similarity.psnr_db:.1f} dB, SSIM {similarity.ssim:.4f}"
