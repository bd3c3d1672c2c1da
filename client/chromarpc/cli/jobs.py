"""`chromarpc job ls`, `show`, `watch`, `redraw`, `cancel`, `rm`: jobs that outlive the command that made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from chromarpc.cli.connection import with_client
from chromarpc.cli.event_json import message_json
from chromarpc.cli.exits import EXIT_CODES_HELP, UsageError, printable, say
from chromarpc.cli.files import ImageFiles, image_files, output_file, preview_folder
from chromarpc.cli.following import follow
from chromarpc.cli.progress import bytes_text, display
from chromarpc.cli.request import request_format
from chromarpc.client import Client
from chromarpc.sampling import FLOWMATCH, REFERENCE
from chromarpc.v1 import job_event_pb2, job_service_pb2

MAX_PROMPT_TEXT = 60
"""Characters of a prompt in a list."""

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId: TypeAlias = Annotated[str, typer.Argument(metavar="JOB", help="As `chromarpc job ls` shows it.")]
JobIds: TypeAlias = Annotated[list[str], typer.Argument(metavar="JOB")]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="File to write, overwriting; out.png, .jpg or .webp as the job has it when left out. {index} and "
        "{seed} in its name are filled in; several images get -0, -1, … without {index}.",
    ),
]
PreviewDir: TypeAlias = Annotated[
    Path | None, typer.Option(help="Write the job's previews here, while it runs; made if need be.")
]
Events: TypeAlias = Annotated[
    bool, typer.Option("--events", help="Print every event on stdout, one JSON object a line.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("-q", "--quiet", help="Show no progress, only warnings and errors.")
]

job_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="List, watch, redraw, cancel and forget jobs; `chromarpc generate --detach` makes them.",
)


class State(StrEnum):
    """Values of `--state`."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@job_app.command("ls")
@with_client
def list_(
    client: Client,
    *,
    state: Annotated[list[State] | None, typer.Option(help="Only these; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """List your jobs, newest first."""
    states = [job_service_pb2.JobState.Value(f"JOB_STATE_{one.name}") for one in state or ()]
    jobs = client.list_jobs(states=states)
    if as_json:
        typer.echo(json.dumps({"jobs": [message_json(job) for job in jobs]}, indent=2))
        return
    for job in jobs:
        prompt = " ".join(job.plan.prompts[0].prompt.split()) if job.plan.prompts else ""
        cut = prompt if len(prompt) <= MAX_PROMPT_TEXT else f"{prompt[: MAX_PROMPT_TEXT - 1]}…"
        created = f"{_local(job.create_time):%Y-%m-%d %H:%M:%S}"
        typer.echo(printable(f"{job.job_id}  {created}  {_progress_text(job):<17}  {cut}".rstrip()))
    if not jobs:
        say("the server has no such jobs of yours" if state else "the server has no jobs of yours")


@job_app.command("show")
@with_client
def show(client: Client, job_id: JobId, *, as_json: AsJson = False) -> None:
    """Tell how a job is."""
    job = client.get_job(job_id)
    if as_json:
        typer.echo(json.dumps(message_json(job), indent=2))
        return
    for line in _lines(job):
        typer.echo(printable(line))


@job_app.command("watch", epilog=EXIT_CODES_HELP)
@with_client
def watch(
    client: Client,
    job_id: JobId,
    *,
    output: Output = None,
    preview_dir: PreviewDir = None,
    events: Events = False,
    quiet: Quiet = False,
) -> None:
    """Follow a job from its first event to its last, and save its pictures; also after it ended.

    Ctrl-C ends the watching and not the job.
    """
    files = _destination(client, job_id, output, preview_dir)
    with client.watch_job(job_id) as stream, display(quiet=quiet or events) as shown:
        follow(stream, files, preview_dir, shown, events=events)


@job_app.command("redraw", epilog=EXIT_CODES_HELP)
@with_client
def redraw(
    client: Client,
    job_id: JobId,
    *,
    output: Output = None,
    preview_dir: PreviewDir = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Queue it, print the new job's id and leave; `chromarpc job watch` saves its pictures.",
        ),
    ] = False,
    events: Events = False,
    quiet: Quiet = False,
) -> None:
    """Draw a job that ended again, in a new job with its plan, seeds and adapters, and save the pictures.

    Pictures of the old job that were damaged on the server's disk are whole again after it.
    Ctrl-C ends the watching and not the new job.
    """
    if detach:
        unused = {"-o": output, "--preview-dir": preview_dir, "--events": events}
        if unwanted := [name for name, value in unused.items() if value]:
            raise UsageError(f"--detach waits for nothing; leave out {', '.join(unwanted)}")
        typer.echo(client.redraw_job(job_id).job_id)
        return
    files = _destination(client, job_id, output, preview_dir)
    job = client.redraw_job(job_id)
    if not quiet:
        say(f"the new job is {job.job_id}")
    with client.watch_job(job.job_id) as stream, display(quiet=quiet or events) as shown:
        follow(stream, files, preview_dir, shown, events=events)


@job_app.command("cancel")
@with_client
def cancel(client: Client, job_ids: JobIds) -> None:
    """Stop jobs: at once while they wait, within a step while they run."""
    for job_id in job_ids:
        client.cancel_job(job_id)


@job_app.command("rm")
@with_client
def remove(client: Client, job_ids: JobIds) -> None:
    """Forget jobs that ended, and their pictures."""
    for job_id in job_ids:
        client.delete_job(job_id)


def _destination(client: Client, job_id: str, output: Path | None, preview_dir: Path | None) -> ImageFiles:
    """Where a job's pictures go; what cannot be written is found before anything is drawn for it."""
    if output is not None:
        output_file(output)
    plan = client.get_job(job_id).plan
    files, _ = image_files(output, request_format(plan.output), len(plan.prompts))
    if preview_dir is not None:
        preview_folder(preview_dir)
    return files


def _lines(job: job_service_pb2.Job) -> Iterator[str]:
    yield f"{job.job_id}: {_progress_text(job)}"
    if job.request_id:
        yield f"  request   {job.request_id}"
    settings = f", as {job.plan.settings}" if job.plan.settings not in ("", REFERENCE) else ""
    yield f"  model     {job.plan.served_model}, {job.plan.profile}{settings}"
    for lora in job.plan.loras:
        yield f"  lora      {lora.path} × {lora.network_multiplier:g}"
    for prompt in job.plan.prompts:
        yield f"  prompt    {' '.join(prompt.prompt.split())}"
        yield (
            f"            {prompt.width}x{prompt.height}, {prompt.sample_steps} steps, "
            f"guidance {prompt.guidance_scale:g}, seed {prompt.seed}{_sampling_text(prompt)}"
        )
        if prompt.neg:
            yield f"  negative  {' '.join(prompt.neg.split())}"
    for name, time in (
        ("created", "create_time"),
        ("started", "start_time"),
        ("ended", "end_time"),
        ("kept to", "expire_time"),
    ):
        if job.HasField(time):  # type: ignore[arg-type]
            yield f"  {name:<9} {_local(getattr(job, time)):%Y-%m-%d %H:%M:%S}"
    if job.attempt_count > 1:
        yield f"  attempts  {job.attempt_count}: the server was stopped while it ran"
    for image in job.images:
        size = f"{image.width}x{image.height}, seed {image.seed}, {bytes_text(image.size_bytes)}"
        yield f"  image {image.prompt_index:<3} {size}, sha256 {image.sha256}"
    if job.HasField("failure"):
        yield f"  failure   {job.failure.message}"


def _sampling_text(prompt: job_event_pb2.PlannedPrompt) -> str:
    """What it is sampled with; nothing of the reference's way, and of an older server, which has no other."""
    if prompt.sampler in ("", FLOWMATCH) and prompt.schedule in ("", FLOWMATCH) and not prompt.HasField("shift"):
        return ""
    shift = f", shift {prompt.shift:g}" if prompt.HasField("shift") else ""
    return f", sampler {prompt.sampler}, schedule {prompt.schedule}{shift}"


def _progress_text(job: job_service_pb2.Job) -> str:
    """`queued, number 3`, `running 12/50`, `succeeded`."""
    state = job_service_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    if job.state == job_service_pb2.JOB_STATE_QUEUED and job.queue_position:
        return f"{state}, number {job.queue_position}"
    if job.state == job_service_pb2.JOB_STATE_RUNNING:
        return f"{state} {job.done_steps}/{job.total_steps}"
    return state


def _local(time: Timestamp) -> datetime:
    return datetime.fromtimestamp(time.seconds).astimezone()
