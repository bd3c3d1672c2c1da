"""The `chromarpc` command: generates pictures, and asks a server what it serves.

`generate.py` runs a generation, `sweep.py` one for each multiplier, `replay.py` a training run's samples;
`explain.py` says what pictures were drawn with; `inquiry.py` holds the short questions; `loras.py` looks after
adapters, `jobs.py` after jobs; `connection.py` has common options, `interrupt.py` Ctrl-C.
Every error ends in `exits.py`, which alone knows sentences and exit codes.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chromarpc.cli.exits import EXIT_CODES_HELP
from chromarpc.cli.explain import COMPARE_EXAMPLES, COMPARE_HELP, EXPLAIN_EXAMPLES, compare, explain
from chromarpc.cli.generate import EXAMPLES, generate
from chromarpc.cli.inquiry import health, info, models
from chromarpc.cli.jobs import job_app
from chromarpc.cli.loras import lora_app
from chromarpc.cli.replay import REPLAY_EXAMPLES, replay
from chromarpc.cli.sweep import SWEEP_EXAMPLES, sweep
from chromarpc.version import __version__

app = typer.Typer(
    name="chromarpc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: in rich markup `[trigger]` would be a tag.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=f"Draws pictures with Chroma and LoRAs on a chromarpc server.\n\n{EXIT_CODES_HELP}",
)
app.command(epilog=f"{EXAMPLES}\n\n{EXIT_CODES_HELP}")(generate)
app.command(epilog=f"{SWEEP_EXAMPLES}\n\n{EXIT_CODES_HELP}")(sweep)
app.command(epilog=f"{REPLAY_EXAMPLES}\n\n{EXIT_CODES_HELP}")(replay)
app.command(epilog=EXPLAIN_EXAMPLES)(explain)
app.command(epilog=f"{COMPARE_EXAMPLES}\n\n{COMPARE_HELP}")(compare)
app.command()(models)
app.command()(info)
app.command()(health)
app.add_typer(lora_app, name="lora")
app.add_typer(job_app, name="job")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chromarpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `chromarpc` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end a run
            stream.reconfigure(errors="backslashreplace")
    app()
