"""`chromarpc lora ls`, `inspect`, `upload` and `rm`: the adapters of a server."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from chromarpc.cli.connection import with_client
from chromarpc.cli.exits import UsageError, printable, say
from chromarpc.cli.progress import bytes_text, warning_text
from chromarpc.client import Client
from chromarpc.loras import BlockStrength, LoraInspection
from chromarpc.upload import UploadProgress

BAR_WIDTH = 40
"""Characters of the longest bar."""
MAX_KEYS = 3
"""Keys without effect that are shown."""
MAX_METADATA_TEXT = 100
"""Characters of one value of a file's header that are shown."""

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LoraPath: TypeAlias = Annotated[str, typer.Argument(metavar="PATH", help="As `chromarpc lora ls` shows it.")]

lora_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="List, describe, upload and delete the LoRAs of a server.",
)


@lora_app.command("ls")
@with_client
def list_(client: Client, *, as_json: AsJson = False) -> None:
    """List the LoRAs that a server has."""
    found = client.list_loras()
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
        return
    for lora in found:
        name = f"  {lora.filename}" if lora.filename else ""
        typer.echo(
            printable(
                f"{lora.path}  {bytes_text(lora.size_bytes)}  {lora.modified_time:%Y-%m-%d %H:%M}  "
                f"{lora.source}{name}"
            )
        )
    if not found.loras:
        say("the server has no LoRAs")
    if found.truncated:
        say("the server's folder holds more than is listed")


@lora_app.command("inspect")
@with_client
def inspect_(
    client: Client,
    path: LoraPath,
    *,
    model: Annotated[str | None, typer.Option(help="The model it is for; chroma when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a LoRA is, and how strongly it changes each block of a model."""
    found = client.inspect_lora(path, model=model)
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=2))
        return
    for line in _inspection_lines(found):
        typer.echo(printable(line))
    if found.blocks:
        _draw_blocks(found.blocks)
    for warning in found.warnings:
        say(warning_text(warning))


@lora_app.command("upload")
@with_client
def upload(
    client: Client,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file of this machine.")],
    *,
    name: Annotated[str | None, typer.Option(help="What to call it in lists; the file's own name.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
) -> None:
    """Upload a LoRA and print the path that names it in requests.

    What was uploaded before is not sent again.
    """
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file")
    with _progress(file.name, quiet=quiet) as progress:
        lora = client.upload_lora(file, filename=name, progress=progress)
    typer.echo(json.dumps(_plain(lora), indent=2) if as_json else printable(lora.path))


@lora_app.command("rm")
@with_client
def remove(client: Client, paths: Annotated[list[str], typer.Argument(metavar="PATH")]) -> None:
    """Delete uploaded LoRAs; those in the server's own folder stay."""
    for path in paths:
        client.delete_lora(path)


def _inspection_lines(found: LoraInspection) -> Iterator[str]:
    yield f"{found.path}: {found.format}, {bytes_text(found.size_bytes)}, for {found.model}"
    yield f"  sha256    {found.sha256}"
    yield f"  types     {', '.join(found.dtypes)}"
    if found.ranks:
        yield f"  ranks     {', '.join(map(str, found.ranks))}"
    if found.alphas:
        yield f"  alphas    {', '.join(f'{alpha:g}' for alpha in found.alphas)}"
    yield f"  changes   {found.changed_parameter_count} parameters by {found.matched_key_count} keys"
    if found.unmatched_key_count:
        more = ", …" if found.unmatched_key_count > MAX_KEYS else ""
        yield f"  unused    {found.unmatched_key_count} keys: {', '.join(found.unmatched_keys[:MAX_KEYS])}{more}"
    for part in found.unsupported:
        yield f"            {part.key_count} of them: {part.name}"
    for key, value in sorted(found.metadata.items()):
        text = " ".join(value.split())
        cut = text if len(text) <= MAX_METADATA_TEXT else f"{text[: MAX_METADATA_TEXT - 1]}…"
        yield f"  {key}: {cut}"


def _draw_blocks(blocks: tuple[BlockStrength, ...]) -> None:
    """A bar for each block; the longest is the strongest."""
    if any(block.relative_norm is not None for block in blocks):
        title = "change, of the block's own norm"
        strengths = [block.relative_norm or 0.0 for block in blocks]
        numbers = [
            "-" if block.relative_norm is None else f"{100 * block.relative_norm:.3g} %" for block in blocks
        ]
    else:  # a server that tells none
        title = "rms change of a weight"
        strengths = [block.rms for block in blocks]
        numbers = [f"{block.rms:.3g}" for block in blocks]
    most = max(strengths)
    table = Table("block", title, "", box=None, pad_edge=False)
    for block, strength, number in zip(blocks, strengths, numbers, strict=True):
        table.add_row(
            Text(printable(block.block)),
            Bar(size=most or 1.0, begin=0, end=strength, width=BAR_WIDTH),
            Text(f"{number}{' and DoRA' if block.has_magnitude else ''}"),
        )
    Console(highlight=False).print(table)


@contextmanager
def _progress(name: str, *, quiet: bool) -> Iterator[UploadProgress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False) as bars:
        task = bars.add_task(printable(name), total=None, amount="")

        def show(sent_bytes: int, total_bytes: int) -> None:
            amount = f"{bytes_text(sent_bytes)} of {bytes_text(total_bytes)}"
            bars.update(task, total=total_bytes, completed=sent_bytes, amount=amount)

        yield show


def _plain(value: object) -> Any:
    """A value of `chromarpc.loras` as JSON takes it."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        return item.isoformat() if hasattr(item, "isoformat") else item

    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} is no dataclass")
    return plain(dataclasses.asdict(value))
