"""What people see while they wait: bars on a terminal, a few plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from chromarpc.cli.exits import printable, say
from chromarpc.events import (
    Accepted,
    Completed,
    Event,
    ImageReady,
    JobWarning,
    Loading,
    Prepared,
    Queued,
    Restarted,
    Step,
)

LINES_PER_IMAGE = 10
"""How many steps of one image are told where there is no terminal."""


class Display(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def show(self, event: Event, path: Path | None) -> None:
        """One event, and the file that it was written to."""
        ...


def display(*, quiet: bool) -> Display:
    """What fits where stderr goes."""
    if quiet:
        return Lines(LINES_PER_IMAGE, quiet=True)
    return Bars() if sys.stderr.isatty() else Lines(LINES_PER_IMAGE)


class Lines:
    """Plain lines; only warnings when `quiet`."""

    def __init__(self, lines_per_image: int, *, quiet: bool = False) -> None:
        self._lines_per_image = lines_per_image
        self._quiet = quiet
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def show(self, event: Event, path: Path | None) -> None:
        """Says what the event says, if it is worth a line."""
        for warning in warnings_of(event):
            say(warning_text(warning))
        if self._quiet:
            return
        match event:
            case Queued():
                say(queue_text(event))
            case Restarted():
                self._stage = ""
                say(restart_text(event))
            case Prepared(second_device=second) if second:
                say(pair_text(event))
            case Loading(stage=stage) if stage != self._stage:
                self._stage = stage
                say(f"loading: {stage}")
            case Step(step=step, total_steps=total):
                every = max(1, total // self._lines_per_image)
                if step in (1, total) or step % every == 0:
                    left = event.estimated_remaining_s
                    tail = "" if left is None else f", about {seconds_text(left)} left"
                    say(f"image {event.prompt_index}: step {step}/{total}{tail}")
            case ImageReady():
                say(f"saved {image_text(event, path)}")
            case Completed():
                say(f"done in {seconds_text(event.timings.total_s)}")


class Bars:
    """A live display: one bar for what comes before denoising, one for each image."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(stderr=True),
            # stdout stays what it is: it may be a pipe that wants the paths.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._before: TaskID | None = None
        self._images: dict[int, TaskID] = {}
        self._spent_s: dict[int, list[float]] = {}
        self._image_count = 1

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

    def show(self, event: Event, path: Path | None) -> None:
        """Moves the bars."""
        for warning in warnings_of(event):
            self._print(warning_text(warning))
        match event:
            case Accepted():
                self._image_count = len(event.prompts)
                self._wait("accepted", None)
            case Queued():
                self._wait(queue_text(event), None)
            case Restarted():
                for index in list(self._images):
                    self._end_image(index)
                self._print(restart_text(event))
            case Loading():
                amount = f"{bytes_text(event.done_bytes)} of {bytes_text(event.total_bytes)}"
                self._wait(f"loading: {event.stage}", event.fraction, amount if event.total_bytes else "")
            case Prepared():
                self._end_wait()
                if event.second_device:
                    self._print(pair_text(event))
            case Step():
                self._end_wait()
                self._step(event)
            case ImageReady():
                self._end_image(event.prompt_index)
                self._print(image_text(event, path))
            case Completed():
                self._end_wait()
                self._print(f"done in {seconds_text(event.timings.total_s)}")

    def _print(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _wait(self, text: str, fraction: float | None, amount: str = "") -> None:
        if self._before is None:
            self._before = self._progress.add_task(text, total=None, amount="", left="")
        self._progress.update(
            self._before,
            description=text,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
            amount=amount,
        )

    def _end_wait(self) -> None:
        if self._before is not None:
            self._progress.remove_task(self._before)
            self._before = None

    def _end_image(self, index: int) -> None:
        # Its line stays; the bars of sixty-four images would fill the screen.
        if index in self._images:
            self._progress.remove_task(self._images.pop(index))

    def _step(self, event: Step) -> None:
        index = event.prompt_index
        if index not in self._images:
            name = "drawing" if self._image_count == 1 else f"image {index + 1} of {self._image_count}"
            self._images[index] = self._progress.add_task(name, total=event.total_steps, amount="", left="")
            self._spent_s[index] = []
        spent = self._spent_s[index]
        spent.append(event.duration_s)
        left_s = (event.total_steps - event.step) * sum(spent) / len(spent)
        self._progress.update(
            self._images[index],
            completed=event.step,
            amount=f"step {event.step}/{event.total_steps}",
            left=f"{seconds_text(left_s)} left" if event.step < event.total_steps else "",
        )


def warnings_of(event: Event) -> tuple[JobWarning, ...]:
    """The warnings that came with an event."""
    return event.warnings if isinstance(event, Accepted | Prepared) else ()


def warning_text(warning: JobWarning) -> str:
    """A warning as a line."""
    about = f"{warning.field}: " if warning.field else ""
    return f"warning: {about}{warning.message}"


def queue_text(event: Queued) -> str:
    """The place in the queue, and how long it lasts if known."""
    place = "next in the queue" if event.position == 1 else f"number {event.position} in the queue"
    return place if event.estimated_wait_s is None else f"{place}, about {seconds_text(event.estimated_wait_s)}"


def restart_text(event: Restarted) -> str:
    """That everything begins again, why, and whether the image may be another one."""
    if not event.moved_from:
        return f"the server was restarted; attempt {event.attempt} begins"
    elsewhere = "one of another model, so images may differ a little" if event.bits_may_differ else "another one"
    return f"device {event.moved_from} was lost; attempt {event.attempt} begins on {elsewhere}"


def pair_text(event: Prepared) -> str:
    """That two devices draw."""
    return f"guidance is computed on two devices: {event.device_id}"


def image_text(event: ImageReady, path: Path | None) -> str:
    """A finished image as a line."""
    image = event.image
    where = path or f"image {event.prompt_index}"
    return f"{where} ({image.width}x{image.height}, seed {image.seed}, {bytes_text(len(image.data))})"


def seconds_text(seconds: float) -> str:
    """A duration for people: `0.4 s`, `12 s`, `3:05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def bytes_text(count: int) -> str:
    """A size for people, in powers of 1000."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
