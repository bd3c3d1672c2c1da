"""How a command ends: sentences on stderr, an exit code, and no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import typer

from chromarpc.errors import (
    AccessDenied,
    AlreadyExists,
    AttemptsExhausted,
    Cancelled,
    ChromarpcError,
    DeadlineExceeded,
    FailedPrecondition,
    ImageDamaged,
    ImageNotFound,
    InvalidRequest,
    JobNotFound,
    LoraChanged,
    NotFound,
    NotKept,
    OutOfMemory,
    RequestIdReused,
    ResourceExhausted,
    ServerUnavailable,
    StatusError,
)
from chromarpc.json_request import InvalidRequestJson


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    UNEXPECTED = 1
    INVALID = 2
    UNAVAILABLE = 3
    NOT_READY = 4
    NO_ROOM = 5
    STOPPED = 6
    BELOW_MIN_PSNR = 7
    NOTHING_DRAWN = 8
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    unexpected: a file that cannot be written, an internal error of the server
  2    the command line or the request is wrong; each field at fault is named
  3    no server answers, or it takes no requests
  4    the server cannot serve this: weights are missing, a LoRA does not fit
  5    no room: the queue is full, or the device's memory
  6    cancelled by the server, or --timeout passed
  7    of `replay`: a sample is less alike than --min-psnr asks
  8    of `replay`: nothing could be drawn
  130  interrupted by Ctrl-C, which cancels a job of `generate`
"""
_CODES: tuple[tuple[type[ChromarpcError], ExitCode], ...] = (
    (InvalidRequest, ExitCode.INVALID),
    (NotFound, ExitCode.INVALID),
    (AccessDenied, ExitCode.INVALID),
    (AlreadyExists, ExitCode.INVALID),
    (ServerUnavailable, ExitCode.UNAVAILABLE),
    (FailedPrecondition, ExitCode.NOT_READY),
    (ResourceExhausted, ExitCode.NO_ROOM),
    (Cancelled, ExitCode.STOPPED),
    (DeadlineExceeded, ExitCode.STOPPED),
    (ChromarpcError, ExitCode.UNEXPECTED),
)


class UsageError(Exception):
    """The command line contradicts itself, or names what cannot be used."""


class NotSaved(Exception):
    """The server did its part, and a file could not be written.

    Attributes:
        lines: sentences for people: which file, why, and where its contents still are.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)
        self.lines = tuple(lines)


def exit_code(error: ChromarpcError) -> ExitCode:
    """The code of a call's error."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def printable(text: str) -> str:
    """Text of a server, without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def say(text: str) -> None:
    """One line for people, on stderr."""
    typer.echo(printable(text), err=True)


@contextmanager
def reported() -> Iterator[None]:
    """Turns whatever goes wrong inside into sentences and an exit code."""
    try:
        yield
    except ChromarpcError as error:
        for line in sentences(error):
            say(line)
        raise typer.Exit(exit_code(error)) from None
    except (UsageError, InvalidRequestJson) as error:
        say(f"error: {error}")
        raise typer.Exit(ExitCode.INVALID) from None
    except NotSaved as error:
        for line in error.lines:
            say(line)
        raise typer.Exit(ExitCode.UNEXPECTED) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has enough; flushing the rest at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.UNEXPECTED) from None
    except OSError as error:
        say(f"error: {file_error(error)}")
        raise typer.Exit(ExitCode.UNEXPECTED) from None
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - the last resort of a command line
        if os.environ.get("CHROMARPC_TRACEBACK"):
            traceback.print_exc()
        say(
            f"error: this is a bug in chromarpc: {type(error).__name__}: {error} "
            "(CHROMARPC_TRACEBACK=1 shows where)"
        )
        raise typer.Exit(ExitCode.UNEXPECTED) from None


def file_error(error: OSError) -> str:
    """Which file, and what is wrong with it."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def sentences(error: ChromarpcError) -> list[str]:
    """An error for people, line by line: what happened, which fields, what to do."""
    if not isinstance(error, StatusError):
        return [f"error: {error.message}"]
    blamed = [f"{v.field}: {v.description}" if v.field else v.description for v in error.violations]
    if len(blamed) == 1 and blamed[0].endswith(error.message):  # one field, and the message is about it
        return [f"error: {blamed[0]}", *_advice(error)]
    lines = [f"error: {error.message}", *(f"  {line}" for line in blamed if line != error.message)]
    return [*lines, *_advice(error)]


def _advice(error: StatusError) -> list[str]:
    if error.retry_after_s is not None:
        return [f"Try again in {max(1, round(error.retry_after_s))} s."]
    if isinstance(error, OutOfMemory):
        return ["A smaller picture may fit."]
    if isinstance(error, RequestIdReused) and "job_id" in error.metadata:
        return [f"Its job is {error.metadata['job_id']}: see `chromarpc job show`."]
    if isinstance(error, ImageDamaged):
        return [f"Draw it again: chromarpc job redraw {error.metadata.get('job_id', 'JOB')}"]
    if isinstance(error, JobNotFound | ImageNotFound):
        return ["See `chromarpc job ls`."]
    if isinstance(error, LoraChanged | NotKept | AttemptsExhausted):
        return ["Make the job again to run it."]
    if isinstance(error, AccessDenied):
        return ["Give a token by --token-file or CHROMARPC_TOKEN."]
    if isinstance(error, ServerUnavailable) and not error.reason:
        return ["Start one with `chromarpc-server`, or say where it is by --target or CHROMARPC_TARGET."]
    command = error.metadata.get("command", "")
    if command and command not in error.message:
        return [f"On the server, run: {command}"]
    if error.metadata.get("error_id", "") not in error.message:
        return [f"The server's log has more under {error.metadata['error_id']}."]
    return []
