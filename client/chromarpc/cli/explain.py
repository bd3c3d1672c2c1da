"""`chromarpc explain` and `chromarpc compare`: what a picture was drawn with, and why two of them differ."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chromarpc.cli.exits import ExitCode, UsageError, printable, reported, say

if TYPE_CHECKING:
    from chromarpc.pictures.comparison import Difference, PixelComparison
    from chromarpc.pictures.facts import PictureFacts
    from chromarpc.pictures.opened import OpenedPicture

SAME, DIFFERENT, UNUSABLE = 0, 1, 2
COMPARE_HELP = """\b
Exit codes:
  0    the same: no field differs and no pixel
  1    different
  2    unusable: a file that is no picture, or nothing that could be compared
"""
EXPLAIN_EXAMPLES = """\b
Examples:
  chromarpc explain circle.png
  chromarpc explain ComfyUI_00001_.png --request > request.json
  chromarpc explain my_lora/samples/1753__000000500_0.jpg --run my_lora
"""
COMPARE_EXAMPLES = """\b
Examples:
  chromarpc compare circle.png again.png
  chromarpc compare sample.jpg drawn.png --run my_lora --difference difference.png
"""
Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="A training run's folder, which tells of its samples."),
]


def explain(
    picture: Annotated[
        Path, typer.Argument(help="PNG, JPEG or WebP of this service, ComfyUI, AUTOMATIC1111, Forge, a trainer.")
    ],
    *,
    run: Run = None,
    request: Annotated[
        bool, typer.Option("--request", help="Print only the request that draws it again, as JSON.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a picture was drawn with, and what to say to a server to draw it again.

    Nothing is asked of any server, and nothing is fetched.
    """
    with reported():
        opened = _open(picture, run)
        facts = opened.facts
        if request:
            if facts.request is None:
                raise UsageError(f"{picture}: {'; '.join(facts.remarks)}")
            _print_json(facts.request)
        elif as_json:
            _print_json(_as_json(opened))
        else:
            for line in _explanation(opened, run):
                typer.echo(printable(line))
        if not facts.facts.keys() - {"width", "height"}:
            raise typer.Exit(ExitCode.INVALID)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A picture.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    *,
    run: Run = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print equal fields too.")] = False,
    difference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PNG of the difference of the pixels, amplified.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say in what two pictures differ, the most telling first, and how far their pixels are apart."""
    outcome = UNUSABLE
    try:
        with reported():
            outcome = _compare(first, second, run, show_all, difference, as_json)
    except typer.Exit as ended:  # what goes wrong is no difference
        raise typer.Exit(ended.exit_code if ended.exit_code == ExitCode.INTERRUPTED else UNUSABLE) from None
    raise typer.Exit(outcome)


def _compare(
    first: Path, second: Path, run: Path | None, show_all: bool, difference: Path | None, as_json: bool
) -> int:
    from chromarpc.pictures.comparison import compare_facts, compare_pixels  # noqa: PLC0415

    one, other = _open(first, run), _open(second, run)
    fields = compare_facts(one.facts, other.facts)
    pixels = compare_pixels(one.data, other.data)
    if as_json:
        _print_json(_comparison_json(one, other, fields, pixels))
    else:
        for line in _comparison(one, other, fields, pixels, show_all):
            typer.echo(printable(line))
    if difference is not None:
        _write_difference(difference, one, other, pixels)
    if any(field.differs for field in fields) or pixels.sizes_differ:
        return DIFFERENT
    if pixels.similarity is None:
        return UNUSABLE
    return SAME if pixels.similarity.same_pixels else DIFFERENT


def _open(path: Path, run: Path | None) -> OpenedPicture:
    # What reads pictures and runs is loaded only here: other commands shall start at once.
    from chromarpc.pictures.files import NoPicture  # noqa: PLC0415
    from chromarpc.pictures.opened import open_picture  # noqa: PLC0415

    try:
        return open_picture(path, run_folder=run)
    except NoPicture as error:
        raise UsageError(f"{path}: {error}") from None


def _explanation(opened: OpenedPicture, run: Path | None) -> Iterator[str]:
    facts, file = opened.facts, opened.file
    drawn_by = f"drawn by {facts.program}" if facts.program else "nobody says by what it was drawn"
    yield f"{opened.path}: {file.kind}, {file.width}×{file.height}, {drawn_by}"
    if not facts.program:
        yield from (f"  {remark}" for remark in facts.remarks)
        return
    for name in facts.names():
        fact = facts.get(name)
        if fact is not None:
            yield f"  {name}: {fact.shown}{f'  ({fact.note})' if fact.note else ''}"
    yield from (f"  note: {remark}" for remark in facts.remarks)
    if facts.request is None:
        return
    yield ""
    if facts.is_ours and opened.facts.request is not None:
        yield "To draw it again:"
        yield f"  chromarpc generate --json {shlex.quote(f'{opened.path}')}"
    else:
        yield "To draw the same with this service, as far as it is known:"
        option = f" --run {shlex.quote(f'{run}')}" if run is not None else ""
        yield f"  chromarpc explain {shlex.quote(f'{opened.path}')}{option} --request > request.json"
        yield "  chromarpc generate --json request.json"
    for url in facts.urls:
        yield f"  which has the server fetch {url}"
    yield "which says:"
    yield from (f"  {line}" for line in json.dumps(facts.request, indent=2, ensure_ascii=False).split("\n"))


def _comparison(
    one: OpenedPicture,
    other: OpenedPicture,
    fields: list[Difference],
    pixels: PixelComparison,
    show_all: bool,
) -> Iterator[str]:
    for field in fields:
        is_told = field.differs or (not field.is_known and field.first != field.second)
        if is_told or show_all:
            yield (field if is_told else replace(field, note="")).line
    yield pixels.line
    for opened in (one, other):
        yield from (f"note: {opened.path}: {remark}" for remark in opened.facts.remarks)


def _write_difference(path: Path, one: OpenedPicture, other: OpenedPicture, pixels: PixelComparison) -> None:
    from chromarpc.pictures.comparison import AMPLIFIED, difference_picture  # noqa: PLC0415

    if pixels.similarity is None:
        say(f"warning: {path} is not written: {pixels.reason}")
        return
    try:
        difference_picture(one.data, other.data).save(path, "PNG")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    say(f"{path}: the difference, {AMPLIFIED} times as bright")


def _as_json(opened: OpenedPicture) -> dict[str, Any]:
    return {
        "file": {"kind": opened.file.kind, "width": opened.file.width, "height": opened.file.height},
        **_facts_json(opened.facts),
    }


def _facts_json(facts: PictureFacts) -> dict[str, Any]:
    found = {name: facts.get(name) for name in facts.names()}
    return {
        "drawn_by": facts.program or None,
        "facts": {
            name: {"value": fact.value, **({"note": fact.note} if fact.note else {})}
            for name, fact in found.items()
            if fact is not None
        },
        "remarks": list(facts.remarks),
        "request": facts.request,
    }


def _comparison_json(
    one: OpenedPicture, other: OpenedPicture, fields: list[Difference], pixels: PixelComparison
) -> dict[str, Any]:
    found = pixels.similarity
    return {
        "a": _as_json(one),
        "b": _as_json(other),
        "differences": [field.name for field in fields if field.differs],
        "unknown": [field.name for field in fields if not field.is_known],
        "pixels": {"reason": pixels.reason}
        if found is None
        else {
            "identical": found.identical,
            "same_pixels": found.same_pixels,
            "psnr_db": found.psnr_db,
            "ssim": found.ssim,
            "largest_difference": found.largest_difference,
        },
    }


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
