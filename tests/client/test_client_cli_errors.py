"""What the `chromarpc` command answers where something went wrong: sentences, and the code it exits with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from chromarpc.cli import app
from chromarpc.cli.exits import _CODES, EXIT_CODES_HELP, ExitCode
from chromarpc.errors import CODE_ERRORS, REASON_ERRORS
from tests.client.client_fake_server import PATIENCE_S, JobEvent, Request, Story, detailed_status, png, refusing
from tests.client.shell import Shell, files


def status(code: grpc.StatusCode, message: str = "because", **details: Any) -> Any:
    return detailed_status(code, message, **details)


REFUSALS = [
    (
        status(
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid request: prompts.0.width, prompts.1.seed",
            reason="INVALID_PARAMETER",
            violations={"prompts.0.width": "must be between 64 and 4096, got 63", "prompts.1.seed": "too small"},
        ),
        2,
        [
            "error: invalid request: prompts.0.width, prompts.1.seed",
            "  prompts.0.width: must be between 64 and 4096, got 63",
            "  prompts.1.seed: too small",
        ],
    ),
    (
        status(
            grpc.StatusCode.NOT_FOUND,
            "no such adapter",
            reason="LORA_NOT_FOUND",
            violations={"loras.0.path": "no such adapter"},
        ),
        2,
        ["error: loras.0.path: no such adapter"],
    ),
    (
        status(grpc.StatusCode.UNAUTHENTICATED, "no token"),
        2,
        ["error: no token", "Give a token by --token-file or CHROMARPC_TOKEN."],
    ),
    (
        status(grpc.StatusCode.UNAVAILABLE, "the server is stopping", reason="DRAINING", retry_after_s=30),
        3,
        ["error: the server is stopping", "Try again in 30 s."],
    ),
    (
        status(
            grpc.StatusCode.FAILED_PRECONDITION,
            "the weights of chroma are missing",
            reason="WEIGHTS_MISSING",
            metadata={"command": "chromarpc-server fetch chroma"},
        ),
        4,
        ["error: the weights of chroma are missing", "On the server, run: chromarpc-server fetch chroma"],
    ),
    (
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", reason="QUEUE_FULL", retry_after_s=0.2),
        5,
        ["error: the queue is full", "Try again in 1 s."],
    ),
    (
        status(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory", reason="OUT_OF_MEMORY"),
        5,
        ["error: out of memory", "A smaller picture may fit."],
    ),
    (
        status(
            grpc.StatusCode.ALREADY_EXISTS,
            "another request was made under this id",
            reason="REQUEST_ID_REUSED",
            metadata={"job_id": "j1"},
            violations={"request_id": "another request was made under this id"},
        ),
        2,
        [
            "error: request_id: another request was made under this id",
            "Its job is j1: see `chromarpc job show`.",
        ],
    ),
    (
        status(
            grpc.StatusCode.UNAVAILABLE, "the server is out of room", reason="STORE_UNAVAILABLE", retry_after_s=5
        ),
        3,
        ["error: the server is out of room", "Try again in 5 s."],
    ),
    (
        status(grpc.StatusCode.UNAVAILABLE, "its images could not be stored", reason="STORE_UNAVAILABLE"),
        3,
        ["error: its images could not be stored"],
    ),
    (
        status(grpc.StatusCode.INTERNAL, "stopped 3 times", reason="ATTEMPTS_EXHAUSTED"),
        1,
        ["error: stopped 3 times", "Make the job again to run it."],
    ),
    (
        status(
            grpc.StatusCode.DATA_LOSS, "the image is damaged", reason="IMAGE_DAMAGED", metadata={"job_id": "j1"}
        ),
        1,
        ["error: the image is damaged", "Draw it again: chromarpc job redraw j1"],
    ),
    (status(grpc.StatusCode.CANCELLED, "cancelled"), 6, ["error: cancelled"]),
    (status(grpc.StatusCode.DEADLINE_EXCEEDED, "too late"), 6, ["error: too late"]),
    (
        status(grpc.StatusCode.INTERNAL, "internal error", reason="INTERNAL", metadata={"error_id": "e1"}),
        1,
        ["error: internal error", "The server's log has more under e1."],
    ),
]


@pytest.mark.parametrize(("refusal", "code", "lines"), REFUSALS, ids=lambda value: None)
def test_what_the_server_refuses_is_told_in_sentences(
    shell: Shell, refusal: Any, code: int, lines: list[str]
) -> None:
    shell.server.script = refusing(refusal)
    result = shell("generate", "a")
    assert (result.exit_code, result.stderr.splitlines(), result.stdout) == (code, lines, "")
    events = shell("generate", "a", "--events")
    assert events.exit_code == code
    (line,) = events.stdout.splitlines()
    assert json.loads(line)["event"] == "error"
    assert json.loads(line)["message"] == refusal.message


def test_every_error_has_an_exit_code_and_every_exit_code_its_help() -> None:
    for kind in {*CODE_ERRORS.values(), *REASON_ERRORS.values()}:
        assert next(code for family, code in _CODES if issubclass(kind, family)) is not ExitCode.OK
    for code in ExitCode:
        assert f"\n  {code.value} " in EXIT_CODES_HELP
    assert "130  interrupted" in CliRunner().invoke(app, ["generate", "--help"]).stdout


@pytest.mark.slow
def test_no_reason_of_the_server_is_told_as_something_else(shell: Shell) -> None:
    codes = pytest.importorskip("chromarpc_server.transport.messages.errors").CODES
    for kind, code in codes.items():
        shell.server.script = refusing(status(code, "the server's own sentence", reason=kind.reason))
        result = shell("generate", "a")
        assert result.stderr.splitlines()[0] == "error: the server's own sentence", kind.reason
        assert (result.exit_code == 1) == (kind.reason in INTERNAL_REASONS), kind.reason


DAMAGE = {"IMAGE_DAMAGED", "JOB_DAMAGED", "LORA_DAMAGED", "STORE_DAMAGED"}
INTERNAL_REASONS = {"INTERNAL", "DEVICE_LOST", "DEVICE_HUNG", "ATTEMPTS_EXHAUSTED"} | DAMAGE
"""Those whose exit code is 1, as an internal error of the server."""


def test_nobody_listens(shell: Shell) -> None:
    for command in (["generate", "a"], ["models"], ["info"], ["health"]):
        result = shell(*command, "--target", "127.0.0.1:1")
        assert result.exit_code == 3
        assert "cannot reach 127.0.0.1:1" in result.stderr
        assert "chromarpc-server" in result.stderr


def test_a_time_limit_that_passes_exits_6_and_cancels(shell: Shell) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        yield Story().accepted(request)
        yield from shell.server.wait_for_end()

    shell.server.script = script
    result = shell("generate", "a", "--timeout", "0.3")
    assert result.exit_code == 6
    assert result.stderr == "error: the time limit passed before the server was done\n"
    assert shell.server.ended.wait(PATIENCE_S)


def test_a_broken_stream_exits_1_and_saves_nothing(shell: Shell) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        yield story.accepted(request)
        yield story.header(png(1))
        yield story.chunk(png(2))

    shell.server.script = script
    result = shell("generate", "a")
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr
    assert files() == []
