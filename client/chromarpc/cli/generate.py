"""`chromarpc generate`: from options to saved pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from chromarpc.cli.connection import with_client
from chromarpc.cli.exits import UsageError
from chromarpc.cli.files import ImageFiles, image_files, preview_folder
from chromarpc.cli.following import follow
from chromarpc.cli.progress import display
from chromarpc.cli.recorded import Recorded, recorded_picture
from chromarpc.cli.request import parse_body, parse_lora, print_request, read_source, request_format
from chromarpc.cli.workflow import workflow_request
from chromarpc.client import Client
from chromarpc.events import TrainerOptions
from chromarpc.pictures.files import kind_of
from chromarpc.request import build_request
from chromarpc.sampling import COMFYUI, REFERENCE, SAMPLERS, SCHEDULES
from chromarpc.v1 import generation_service_pb2

DEFAULT_PREVIEW_EVERY = 5
EXAMPLES = """\b
Examples:
  chromarpc generate "a red circle on a white background" -o circle.png
  chromarpc generate "[trigger] a cat" --trigger-word sks --lora job/my.safetensors:0.8
  chromarpc generate --json request.json --events
  chromarpc generate --json circle.png --seed 43 -o again.png
  chromarpc generate --comfyui workflow.json --seed 43
  chromarpc job watch $(chromarpc generate --detach "a red circle")
"""


class Format(StrEnum):
    """Values of `--format`."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    JPEG_TRAINER = "jpeg-trainer"


class NoiseDrawChoice(StrEnum):
    """Values of `--noise-draw`."""

    FLOAT32 = "float32"
    LEGACY = "legacy"


class LokrFormChoice(StrEnum):
    """Values of `--lokr-form`."""

    FACTORIZED = "factorized"
    WEIGHT = "weight"


def _completing(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes names that this version knows; a newer server may have more, so none is refused here."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


@with_client
def generate(
    client: Client,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw: one image for each.")
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write, overwriting; .png (default out.png), .jpg or .webp. {index} and {seed} in "
            "its name are filled in; several images get -0, -1, … without {index}.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model id; chroma when left out.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:MULTIPLIER][#sha256=HASH]",
            help="LoRA below the server's root, such as job/my.safetensors:0.8; with a hash the server refuses a "
            "file of other content.",
        ),
    ] = None,
    trigger_word: Annotated[str | None, typer.Option(help="Replaces [trigger] in the prompts.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, 64 to 4096.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64 to 4096.")] = None,
    sample_steps: Annotated[
        int | None, typer.Option("--steps", "--sample-steps", help="Denoising steps, 1 to 150.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance", "--guidance-scale", help="Classifier-free guidance, 0 to 20."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same for every prompt, -1 draws one; 42 plus the index when left out."),
    ] = None,
    neg: Annotated[
        str | None,
        typer.Option(help="Negative prompt; honoured with --use-neg, and in preview and preview-exact."),
    ] = None,
    use_neg: Annotated[
        bool | None,
        typer.Option("--use-neg/--no-use-neg", help="Honour --neg in every profile.", show_default=False),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            autocompletion=_completing(SAMPLERS),
            help="Sampler, see `chromarpc info`; the model's default when left out.",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            autocompletion=_completing(SCHEDULES),
            help="Schedule of noise levels, see `chromarpc info`; the model's default when left out.",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            help="Fixed shift of the schedule, 0.01 to 100; 1 shifts nothing; its own when left out, and the "
            "model's default where --schedule is left out too."
        ),
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            autocompletion=_completing((REFERENCE, COMFYUI)),
            help="Whose way of drawing is followed: reference, when left out, or comfyui.",
        ),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Numerics profile, see `chromarpc info`.")] = None,
    noise_draw: Annotated[
        NoiseDrawChoice | None, typer.Option(help="What a seed means; legacy is that of torch up to 2.11.")
    ] = None,
    image_format: Annotated[Format | None, typer.Option("--format", help="As -o's name says.")] = None,
    quality: Annotated[int | None, typer.Option(help="Of JPEG and WebP, 1 to 100; 95.")] = None,
    picture_record: Annotated[
        bool | None,
        typer.Option(
            "--picture-record/--no-picture-record",
            help="Whether each picture carries what it was drawn with; it does, but for jpeg-trainer.",
            show_default=False,
        ),
    ] = None,
    trainer_quantize: Annotated[
        bool | None,
        typer.Option(
            help="The trainer's model.quantize, which is true; for preview profiles.", show_default=False
        ),
    ] = None,
    trainer_qtype: Annotated[str | None, typer.Option(help="The trainer's model.qtype; qfloat8.")] = None,
    trainer_quantize_te: Annotated[
        bool | None,
        typer.Option(help="The trainer's model.quantize_te; as model.quantize.", show_default=False),
    ] = None,
    trainer_dtype: Annotated[str | None, typer.Option(help="The trainer's train.dtype: bf16 or float32.")] = None,
    lokr_form: Annotated[
        LokrFormChoice | None,
        typer.Option(help="How a LoKr is added: factorized, or weight as before 2026-07-15."),
    ] = None,
    preview_dir: Annotated[
        Path | None, typer.Option(help="Write previews here, as preview-INDEX-STEP.png; made if need be.")
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(help=f"Steps from one preview to the next; {DEFAULT_PREVIEW_EVERY}."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Send this JSON body (- is standard input) instead of prompts and options; or draw this picture "
            "of the service again, with what PROMPT and options change.",
        ),
    ] = None,
    comfyui: Annotated[
        Path | None,
        typer.Option(
            "--comfyui",
            metavar="FILE",
            help="Draw what this workflow of ComfyUI draws: its API form (Workflow → Export (API)), or a picture "
            "that ComfyUI saved. PROMPT and options change just what they say.",
        ),
    ] = None,
    print_only: Annotated[
        bool,
        typer.Option("--print-request", help="Print the request as JSON, as --json takes it; draw nothing."),
    ] = False,
    fetch_urls: Annotated[
        bool,
        typer.Option("--fetch-urls", help="Have adapters fetched that --json PICTURE names by URLs, unasked."),
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Queue it, print the job's id and leave; `chromarpc job watch` saves its pictures."
        ),
    ] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Print every event on stdout, one JSON object a line.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Show no progress, only warnings and errors.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which the job is cancelled; none.")
    ] = None,
) -> None:
    """Draw pictures and save them.

    Pictures carry what they were drawn with. Progress goes to stderr; the paths of saved files go to stdout
    where that is no terminal.
    """
    options = {
        "model": model,
        "loras": [parse_lora(text) for text in lora] if lora else None,
        "trigger_word": trigger_word,
        "width": width,
        "height": height,
        "sample_steps": sample_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "neg": neg,
        "use_neg": use_neg,
        "sampler": sampler,
        "schedule": schedule,
        "shift": shift,
        "settings": settings,
        "profile": profile,
        "noise_draw": noise_draw,
        "output_format": image_format,
        "output_quality": quality,
        "picture_record": picture_record,
        "trainer": _trainer(trainer_quantize, trainer_qtype, trainer_quantize_te, trainer_dtype, lokr_form),
        "preview_every": preview_every,
    }
    given = {name: value for name, value in options.items() if value is not None}
    source = _Source(prompts or [], json_file, comfyui)
    if print_only:
        print_request(_wanted(client, source, given, output).request)
        return
    if detach:
        unused = {"-o": output, "--preview-dir": preview_dir, "--events": events, "--timeout": timeout}
        unwanted = [name for name, value in unused.items() if value]
        if unwanted:
            raise UsageError(f"--detach waits for nothing; leave out {', '.join(unwanted)}")
        wanted = _wanted(client, source, given)
        _check_record(client, wanted.recorded, fetch_urls)
        typer.echo(client.create_job_request(wanted.request).job_id)
        return
    wanted, files = _wanted_and_files(client, source, given, output, preview_dir)
    _check_record(client, wanted.recorded, fetch_urls)
    on_event = wanted.recorded.warn_prepared if wanted.recorded is not None else None
    with (
        client.generate_request(wanted.request, timeout_s=timeout) as stream,
        display(quiet=quiet or events) as shown,
    ):
        follow(stream, files, preview_dir, shown, events=events, on_event=on_event)


def _trainer(
    quantize: bool | None,
    qtype: str | None,
    quantize_te: bool | None,
    dtype: str | None,
    lokr_form: LokrFormChoice | None,
) -> TrainerOptions | None:
    """What was said of the trainer's config; None where nothing was."""
    said = TrainerOptions(
        quantize=quantize,
        qtype=qtype,
        quantize_te=quantize_te,
        dtype=dtype,
        lokr_form=lokr_form.value if lokr_form else None,
    )
    return None if said == TrainerOptions() else said


_OPTION_NAMES = {
    "loras": "--lora",
    "sample_steps": "--steps",
    "guidance_scale": "--guidance",
    "output_format": "--format",
    "output_quality": "--quality",
    "picture_record": "--picture-record",
    "trainer": "--trainer-… and --lokr-form",
}


@dataclass(frozen=True)
class _Source:
    """What says what to draw."""

    prompts: list[str]
    json_file: Path | None
    comfyui: Path | None


@dataclass(frozen=True)
class _Wanted:
    """What is to be sent."""

    request: generation_service_pb2.GenerateRequest
    recorded: Recorded | None = None
    """The picture that is drawn again, if any."""


def _check_record(client: Client, recorded: Recorded | None, fetch_urls: bool) -> None:
    if recorded is not None:
        recorded.confirm_urls(confirmed=fetch_urls)
        recorded.warn_before(client)


def _wanted(client: Client, source: _Source, options: dict[str, Any], output: Path | None = None) -> _Wanted:
    """From a body, from prompts and options, or from a picture or a workflow and what these change."""
    prompts, json_file = source.prompts, source.json_file
    if source.comfyui is not None:
        if json_file is not None:
            raise UsageError("--json and --comfyui each say what to draw; leave one out")
        return _Wanted(workflow_request(client, source.comfyui, prompts, options))
    if json_file is None:
        if not prompts:
            raise UsageError("say what to draw: a PROMPT, a request by --json, or a workflow by --comfyui")
        return _Wanted(build_request(prompts, **options))
    names = [_OPTION_NAMES.get(name, "--" + name.replace("_", "-")) for name in options]
    unwanted = (["PROMPT"] if prompts else []) + names
    leave_out = UsageError(f"--json sends a body as it is; leave out {', '.join(unwanted)}")
    try:
        content = read_source(json_file)
    except UsageError as error:
        raise (leave_out if unwanted else error) from None
    if kind_of(content):
        recorded = recorded_picture(json_file, content, prompts, options, output=output)
        return _Wanted(recorded.request, recorded)
    if unwanted:
        raise leave_out
    return _Wanted(parse_body(json_file, content))


def _wanted_and_files(
    client: Client,
    source: _Source,
    options: dict[str, Any],
    output: Path | None,
    preview_dir: Path | None,
) -> tuple[_Wanted, ImageFiles]:
    """What to send, and the files that its images go to; everything is checked before anything is sent."""
    if "preview_every" in options and preview_dir is None:
        raise UsageError("--preview-every needs --preview-dir to write the previews to")
    if source.json_file is not None:
        wanted = _wanted(client, source, options, output)
        files, _ = image_files(output, request_format(wanted.request.output), len(wanted.request.prompts))
    else:
        if preview_dir is not None:
            options = {"preview_every": DEFAULT_PREVIEW_EVERY, **options}
        files, image_format = image_files(output, options.get("output_format"), max(1, len(source.prompts)))
        wanted = _wanted(client, source, {**options, "output_format": image_format})
    if preview_dir is not None:
        preview_folder(preview_dir)
    return wanted, files
