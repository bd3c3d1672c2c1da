"""A job's events as they come: pictures and previews to files, progress to a person, lines to a script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from chromarpc.cli.event_json import error_line, event_line
from chromarpc.cli.exits import NotSaved, file_error, say
from chromarpc.cli.files import ImageFiles, preview_name
from chromarpc.cli.progress import Display
from chromarpc.client import EventStream
from chromarpc.errors import ChromarpcError
from chromarpc.events import Accepted, Event, ImageReady, Preview
from chromarpc.images import write_file


def follow(
    stream: EventStream,
    files: ImageFiles,
    preview_dir: Path | None,
    shown: Display,
    *,
    events: bool,
    on_event: Callable[[Event], None] | None = None,
) -> None:
    """Saves and shows all that comes.

    Args:
        stream: of one job, from its first event on.
        files: where images go.
        preview_dir: where previews go; None keeps none.
        shown: for people.
        events: print every event as a line of JSON.
        on_event: is given each event first.

    A file that cannot be written stops nothing: the job goes on, and what it draws stays with the server.

    Raises:
        ChromarpcError: how the stream ended, where it did not end well.
        NotSaved: it did end well, and a file could not be written.
    """
    on_screen = sys.stdout.isatty() and sys.stderr.isatty()  # then the display has told the paths already
    job_id = ""
    unsaved: dict[type, OSError] = {}
    try:
        for event in stream:
            if on_event is not None:
                on_event(event)
            if isinstance(event, Accepted):
                job_id = event.job_id
            path = None
            try:
                path = _save(event, files, preview_dir)
            except OSError as error:
                unsaved.setdefault(type(event), error)
            else:
                shown.show(event, path)
            if events:
                typer.echo(event_line(event, path))
            elif isinstance(event, ImageReady) and path is not None and not on_screen:
                typer.echo(str(path))
    except ChromarpcError as error:
        if events:
            typer.echo(error_line(error))
        for problem in unsaved.values():
            say(f"error: {file_error(problem)}")
        raise
    if unsaved:
        lines = [f"error: {file_error(error)}" for error in unsaved.values()]
        if ImageReady in unsaved:
            lines.append(f"The server keeps what was drawn: chromarpc job watch {job_id} -o FILE")
        raise NotSaved(lines)


def _save(event: Event, files: ImageFiles, preview_dir: Path | None) -> Path | None:
    match event:
        case ImageReady(image=image):
            return image.save(files.path(image.prompt_index, image.seed))
        case Preview() if preview_dir is not None:
            name = preview_name(event.prompt_index, event.step, event.media_type)
            return write_file(preview_dir / name, event.data)
    return None
