"""`chromarpc sweep`: one picture for every multiplier of an adapter, side by side on one sheet."""

from __future__ import annotations

import io
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw, ImageFont

from chromarpc.cli.connection import with_client
from chromarpc.cli.exits import NotSaved, UsageError, file_error, printable, say
from chromarpc.cli.files import output_file
from chromarpc.client import Client
from chromarpc.events import ImageFormat, ImageReady
from chromarpc.images import GeneratedImage, write_file
from chromarpc.request import Lora, build_request

MAX_CELLS = 256
MARGIN_PX = 6
LABEL_PX = 18
LONGEST_SIDES_PX: dict[ImageFormat, int] = {"jpeg": 65_500, "webp": 16_383}
"""What the formats can hold; a PNG holds any sheet."""
SWEEP_EXAMPLES = """\b
Examples:
  chromarpc sweep "a cat" --lora job/my.safetensors:0,0.5,1 -o sweep.png
  chromarpc sweep "a cat" "a dog" --lora a.safetensors:0,0.5,1 --lora b.safetensors:0.8
  chromarpc sweep "a cat" --lora a.safetensors:0,0.5,1 --lora b.safetensors:0,0.5,1
"""


@dataclass(frozen=True)
class Sweep:
    """An adapter and the multipliers it is tried with."""

    path: str
    multipliers: tuple[float, ...]


def parse_sweep(text: str) -> Sweep:
    """`PATH:M1,M2,…`.

    Raises:
        UsageError: there are no multipliers, or something that is not one.
    """
    path, separator, listed = text.rpartition(":")
    try:
        multipliers = tuple(float(number) for number in listed.split(","))
    except ValueError:
        multipliers = ()
    if not (separator and path and multipliers and all(map(math.isfinite, multipliers))):
        raise UsageError(f"--lora {text}: say PATH:MULTIPLIER,MULTIPLIER,…")
    return Sweep(path, multipliers)


@with_client
def sweep(
    client: Client,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw: a row for each.")],
    *,
    lora: Annotated[
        list[str],
        typer.Option(
            metavar="PATH:M1,M2,…",
            help="LoRA and its multipliers; one with several makes columns, a second one, with one prompt, rows.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write, overwriting; .png, .jpg or .webp.")
    ] = Path("sweep.png"),
    model: Annotated[str | None, typer.Option(help="Model id; chroma when left out.")] = None,
    trigger_word: Annotated[str | None, typer.Option(help="Replaces [trigger] in the prompts.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, 64 to 4096.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64 to 4096.")] = None,
    sample_steps: Annotated[
        int | None, typer.Option("--steps", "--sample-steps", help="Denoising steps, 1 to 150.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", "--guidance-scale", help="Classifier-free guidance, 0 to 20.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same for every picture.")] = 42,
    tile: Annotated[int, typer.Option(min=32, max=2048, help="Longer side of a picture on the sheet.")] = 256,
) -> None:
    """Draw the same prompts with an adapter at several multipliers, and lay them out on one sheet."""
    sweeps = [parse_sweep(text) for text in lora]
    varied = [index for index, one in enumerate(sweeps) if len(one.multipliers) > 1]
    if len(varied) > (2 if len(prompts) == 1 else 1):
        raise UsageError("at most one adapter may have several multipliers, or two with a single prompt")
    settings = list(itertools.product(*(one.multipliers for one in sweeps)))
    if len(settings) * len(prompts) > MAX_CELLS:
        raise UsageError(f"{len(settings) * len(prompts)} pictures are more than {MAX_CELLS}")
    image_format = output_file(output)
    _check_size(image_format, sweeps, varied, len(settings) * len(prompts), tile)
    options = {
        "model": model, "trigger_word": trigger_word, "width": width, "height": height,
        "sample_steps": sample_steps, "guidance_scale": guidance_scale,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    columns: list[list[GeneratedImage]] = []
    for number, setting in enumerate(settings, 1):
        loras = [Lora(one.path, multiplier) for one, multiplier in zip(sweeps, setting, strict=True)]
        say(f"{number}/{len(settings)}: " + ", ".join(f"{one.path} x {one.network_multiplier:g}" for one in loras))
        request = build_request(prompts, **given, seed=seed, loras=loras)
        with client.generate_request(request) as stream:
            columns.append([event.image for event in stream if isinstance(event, ImageReady)])
    sheet = _sheet(columns, sweeps, varied, settings, prompts, tile)
    typer.echo(str(_saved(sheet, output, image_format)))


def _saved(sheet: Image.Image, output: Path, image_format: ImageFormat) -> Path:
    """Writes the sheet, elsewhere where it cannot be written where it should be.

    Raises:
        NotSaved: it is not where it should be.
    """
    encoded = io.BytesIO()
    sheet.save(encoded, image_format, **({} if image_format == "png" else {"quality": 95}))
    try:
        return write_file(output, encoded.getvalue())
    except OSError as error:
        lines = [f"error: {file_error(error)}"]
    try:
        elsewhere = write_file(Path(tempfile.mkdtemp(prefix="chromarpc-")) / output.name, encoded.getvalue())
        lines.append(f"The sheet is in {elsewhere}")
    except OSError:
        lines.append("The server keeps the pictures: chromarpc job ls")
    raise NotSaved(lines)


def _check_size(
    image_format: ImageFormat, sweeps: Sequence[Sweep], varied: Sequence[int], pictures: int, tile: int
) -> None:
    across = len(sweeps[varied[-1] if varied else 0].multipliers)
    width = across * (tile + MARGIN_PX) + MARGIN_PX
    height = LABEL_PX + MARGIN_PX + pictures // across * (tile + LABEL_PX + MARGIN_PX)
    limit = LONGEST_SIDES_PX.get(image_format)
    if limit is not None and max(width, height) > limit:
        raise UsageError(
            f"a sheet of {width}x{height} is more than a {image_format} can hold: take a smaller --tile, or .png"
        )


def _sheet(
    pictures: Sequence[Sequence[GeneratedImage]],
    sweeps: Sequence[Sweep],
    varied: Sequence[int],
    settings: Sequence[tuple[float, ...]],
    prompts: Sequence[str],
    tile: int,
) -> Image.Image:
    """Pictures by setting and prompt, as a grid with its labels."""
    last = varied[-1] if varied else 0
    across = len(sweeps[last].multipliers)
    labels = [f"{Path(sweeps[last].path).stem} {multiplier:g}" for multiplier in sweeps[last].multipliers]
    if len(prompts) == 1:
        cells = [[column[0] for column in pictures[row : row + across]] for row in range(0, len(pictures), across)]
        rows = [
            f"{Path(sweeps[varied[0]].path).stem} {settings[row][varied[0]]:g}" if len(varied) > 1 else prompts[0]
            for row in range(0, len(pictures), across)
        ]
    else:
        cells = [[column[row] for column in pictures] for row in range(len(prompts))]
        rows = list(prompts)
    images = [[cell.image for cell in line] for line in cells]
    scale = tile / max(images[0][0].size)
    size = tuple(max(1, round(side * scale)) for side in images[0][0].size)
    font = ImageFont.load_default(LABEL_PX * 2 // 3)
    line_height = size[1] + LABEL_PX + MARGIN_PX
    sheet = Image.new(
        "RGB",
        (across * (size[0] + MARGIN_PX) + MARGIN_PX, LABEL_PX + MARGIN_PX + len(images) * line_height),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((MARGIN_PX + column * (size[0] + MARGIN_PX), 3), printable(label), "black", font)
    for row, line in enumerate(images):
        top = LABEL_PX + MARGIN_PX + row * line_height
        draw.text((MARGIN_PX, top), printable(rows[row]), "black", font)
        for column, image in enumerate(line):
            small = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)
            sheet.paste(small, (MARGIN_PX + column * (size[0] + MARGIN_PX), top + LABEL_PX))
    return sheet
