"""The `chromarpc` command: what it sends, saves, prints and answers to the shell."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from client_fake_server import (
    PATIENCE_S,
    FakeServer,
    JobEvent,
    Request,
    Story,
    detailed_status,
    png,
    refusing,
    whole_job,
)
from grpc_health.v1 import health_pb2
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from chromarpc import Lora, parse_request_json
from chromarpc.cli import app, progress
from chromarpc.cli.exits import _CODES, EXIT_CODES_HELP, ExitCode
from chromarpc.cli.interrupt import interruptible
from chromarpc.cli.progress import Bars, bytes_text, seconds_text
from chromarpc.cli.request import parse_lora
from chromarpc.errors import CODE_ERRORS, REASON_ERRORS
from chromarpc.request import build_request
from chromarpc.stream import StreamReader
from chromarpc.v1 import generation_service_pb2, job_event_pb2

GOLDENS = Path(__file__).parent.parent / "goldens" / "requests" / "reference_requests.json"


def files(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class Shell:
    """Runs the command against one server, in an empty folder."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *arguments: str, text_in: str | None = None) -> Any:
        result = CliRunner().invoke(
            app, list(arguments), input=text_in, env={"CHROMARPC_TARGET": self.server.target}
        )
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(server)


def test_options_become_the_request(shell: Shell) -> None:
    arguments = (
        "generate", "[trigger] a cat", "a dog", "--trigger-word", "sks", "--lora", "j/l.safetensors:0.8",
        "--lora", "k.safetensors", "--model", "chroma-mini", "--width", "256", "--height", "128", "--steps", "4",
        "--guidance", "3.7", "--seed", "7", "--neg", "", "--profile", "exact", "--noise-draw", "legacy",
        "-o", "a.webp", "--quality", "80", "--timeout", "30",
    )  # fmt: skip
    result = shell(*arguments)
    assert result.exit_code == 0, result.stderr
    assert shell.server.requests == [
        build_request(
            ["[trigger] a cat", "a dog"],
            trigger_word="sks",
            loras=[Lora("j/l.safetensors", 0.8), "k.safetensors"],
            model="chroma-mini",
            width=256,
            height=128,
            sample_steps=4,
            guidance_scale=3.7,
            seed=7,
            neg="",
            profile="exact",
            noise_draw="legacy",
            output_format="webp",
            output_quality=80,
        )
    ]


def test_one_image_goes_where_it_is_told_and_its_path_to_stdout(shell: Shell) -> None:
    Path("circle.png").write_text("old")
    result = shell("generate", "a red circle", "-o", "circle.png")
    assert result.exit_code == 0
    assert result.stdout == "circle.png\n"
    with Image.open("circle.png") as picture:
        picture.load()
        assert picture.size == (32, 32)
        assert json.loads(picture.text["chromarpc"])["request"]["prompts"][0]["prompt"] == "a red circle"
    assert files() == ["circle.png"]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (None, ["out-0.png", "out-1.png"]),
        ("a.png", ["a-0.png", "a-1.png"]),
        ("{index}of-{seed}.png", ["0of-42.png", "1of-43.png"]),
        ("{seed}.png", ["42-0.png", "43-1.png"]),
        ("{not this}.png", ["{not this}-0.png", "{not this}-1.png"]),
    ],
)
def test_several_images_get_names_of_their_own(shell: Shell, output: str | None, names: list[str]) -> None:
    result = shell("generate", "a", "b", *(["-o", output] if output else []))
    assert result.exit_code == 0
    assert files() == names
    assert result.stdout.splitlines() == names


def test_previews_are_written_when_asked_for(shell: Shell) -> None:
    result = shell("generate", "a", "--preview-dir", "some/where", "--preview-every", "1")
    assert result.exit_code == 0
    assert files("some/where") == ["preview-0-001.png", "preview-0-002.png"]
    assert Path("some/where/preview-0-001.png").read_bytes() == png(9)
    assert shell.server.requests[0].preview.every_n_steps == 1


def test_lines_tell_what_happens(shell: Shell) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        warning = job_event_pb2.Warning(
            code="SIZE_SNAPPED", field="prompts.0.width", message="floored to 32\x1b[2J"
        )
        yield story.accepted(request, warnings=[warning])
        yield from list(whole_job(request, context))[1:]

    shell.server.script = script
    result = shell("generate", "a")
    assert result.stderr.splitlines() == [
        "warning: prompts.0.width: floored to 32\N{REPLACEMENT CHARACTER}[2J",
        "number 2 in the queue, about 40 s",
        "next in the queue",
        "loading: reading",
        "image 0: step 1/2, about 0.8 s left",
        "image 0: step 2/2, about 0.8 s left",
        f"saved out.png (32x32, seed 42, {len(png(0))} bytes)",
        "done in 1.5 s",
    ]
    assert shell("generate", "a", "--quiet").stderr.splitlines() == result.stderr.splitlines()[:1]


def test_bars_show_the_same_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    request = build_request(["a", "b"])
    reader = StreamReader()
    with Bars() as bars:
        for message in whole_job(request, None):
            event = reader.read(generation_service_pb2.GenerateResponse(event=message))
            if event is not None:
                bars.show(event, None)
                bars._progress.refresh()
    shown = screen.getvalue()
    for text in ("number 2 in the queue, about 40 s", "reading", "500 bytes of 1.0 kB", "image 2 of 2",
                 "step 1/2", "0.2 s left", "image 1 (32x32, seed 43", "done in 1.5 s"):  # fmt: skip
        assert text in shown


def test_events_are_json_lines_with_paths_and_no_bytes(shell: Shell) -> None:
    result = shell("generate", "a", "--events", "--preview-dir", "p")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        "accepted", "queued", "queued", "loading", "loading", "heartbeat", "prepared",
        "step", "preview", "step", "preview", "image_ready", "completed",
    ]  # fmt: skip
    assert events[0]["prompts"][0]["seed"] == 42
    assert events[0]["time"] == "2026-01-02T03:04:05.250000+00:00"
    assert events[7]["sigmas"] == [1.0, 0.5, 0.0]
    assert events[8]["path"] == "p/preview-0-001.png"
    assert events[11]["path"] == "out.png"
    assert events[11]["image"]["size_bytes"] == len(png(0))
    assert "data" not in events[8]
    assert result.stderr == ""


def test_the_references_minimal_body_is_sent_as_it_is(shell: Shell) -> None:
    body = json.loads(GOLDENS.read_text("utf-8"))["accepted"][0]["request"]
    Path("request.json").write_text(json.dumps(body))
    wanted = parse_request_json(json.dumps(body)).request
    assert shell("generate", "--json", "request.json").exit_code == 0
    assert shell("generate", "--json", "-", text_in=json.dumps(body)).exit_code == 0
    assert shell.server.requests == [wanted, wanted]


def test_unknown_keys_are_a_warning(shell: Shell) -> None:
    result = shell("generate", "--json", "-", text_in='{"prompts": [{"prompt": "a", "cfg": 3}], "x": 1}')
    assert result.exit_code == 0
    assert result.stderr.splitlines()[:2] == [
        "warning: prompts.0.cfg: unknown, left out",
        "warning: x: unknown, left out",
    ]


def test_a_saved_picture_can_be_drawn_again(shell: Shell) -> None:
    assert shell("generate", "[trigger]", "--trigger-word", "ä", "--lora", "l", "-o", "a.png").exit_code == 0
    result = shell("generate", "--json", "a.png", "-o", "b.png")
    assert result.exit_code == 0, result.stderr
    again = shell.server.requests[1]
    assert (again.prompts[0].prompt, again.prompts[0].seed, again.prompts[0].sample_steps) == ("ä", 42, 2)
    assert again.loras[0].network_multiplier == 0.5


def test_every_wrong_value_of_a_json_request_is_told_at_once(shell: Shell) -> None:
    body = '{"model": 1, "prompts": [{"prompt": "a", "width": "wide", "seed": []}]}'
    result = shell("generate", "--json", "-", text_in=body)
    assert result.exit_code == 2
    assert [
        at for at in ("model", "prompts.0.width", "prompts.0.seed") if f"  {at}: must" not in result.stderr
    ] == []


def test_the_format_follows_the_body_of_a_json_request(shell: Shell) -> None:
    body = '{"prompts": [{"prompt": "a"}], "output": {"format": "IMAGE_FORMAT_JPEG"}}'
    assert shell("generate", "--json", "-", text_in=body).stdout == "out.jpg\n"
    assert shell("generate", "--json", "-", "-o", "a.jpeg", text_in=body).exit_code == 0
    result = shell("generate", "--json", "-", "-o", "a.png", text_in=body)
    assert result.exit_code == 2
    assert "the name says png and the request says jpeg" in result.stderr


USAGE_ERRORS: list[tuple[list[str], str]] = [
    (["generate"], "say what to draw"),
    (["generate", "a", "--json", "r.json", "--width", "64", "--steps", "3"], "leave out PROMPT, --width, --steps"),
    (["generate", "--json", "none.json"], "none.json: No such file"),
    (["generate", "--json", "."], "Is a directory"),
    (["generate", "--json", "plain.png"], "does not say what it was drawn with"),
    (["generate", "--json", "broken.png"], "cannot be read"),
    (["generate", "--json", "a.jpg"], "a.jpg: is a picture (JPEG) that does not say what it was drawn with"),
    (["generate", "--json", "a.webp"], "a.webp: is a picture (WebP)"),
    (["generate", "--json", "a.gif"], "a.gif: is a picture (GIF)"),
    (["generate", "--json", "a.bmp"], "a.bmp: is a picture (BMP)"),
    (["generate", "--json", "a.tiff"], "a.tiff: is a picture (TIFF)"),
    (["generate", "--json", "a.safetensors"], "a.safetensors: is neither text nor a PNG"),
    (["generate", "--detach", "--json", "a.jpg"], "a.jpg: is a picture (JPEG)"),
    (["generate", "--json", "empty.txt"], "empty.txt: is empty"),
    (["generate", "--json", "folder.png"], "folder.png: Is a directory"),
    (["generate", "--json", "huge.json"], "huge.json: more than 64 MiB"),
    (["generate", "--json", "wrong.json"], "prompts.0.width: must be a whole number, got text"),
    (["generate", "a", "-o", "a.tiff"], "name a file that ends in .png"),
    (["generate", "a", "-o", "a"], "name a file that ends in .png"),
    (["generate", "a", "-o", "a.png", "--format", "webp"], "the name says png"),
    (["generate", "a", "-o", "no/such/a.png"], "no such folder"),
    (["generate", "a", "-o", "folder.png"], "is a folder"),
    (["generate", "a", "--preview-every", "3"], "--preview-dir"),
    (["generate", "a", "--preview-dir", "plain.png"], "plain.png: File exists"),
    (["generate", "a", "--width", "4294967296"], "prompts.0.width"),
    (["generate", "a", "--width", "wide"], "valid integer"),
    (["generate", "a", "--format", "gif"], "gif"),
    (["generate", "a", "--tls-cert", "plain.png"], "come together"),
    (["generate", "a", "--tls-root", "none.pem"], "none.pem: No such file"),
    (["models", "--token-file", "none.txt"], "none.txt: No such file"),
    (["models", "--token-file", "empty.txt"], "token is empty"),
    (["models", "--token-file", "plain.png"], "holds no token"),
    (["models", "--token-file", "token.txt", "--target", "gpu.example:1"], "--insecure-token"),
    (["paint"], "paint"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE_ERRORS, ids=lambda value: str(value)[:50])
def test_a_wrong_command_line_exits_2_before_anything_is_sent(
    shell: Shell, arguments: list[str], text: str
) -> None:
    Path("plain.png").write_bytes(png())
    Path("broken.png").write_bytes(png()[:30])
    Path("folder.png").mkdir()
    Path("empty.txt").touch()
    Path("token.txt").write_text("s3cret\n")
    for suffix, file_format in (
        ("jpg", "JPEG"),
        ("webp", "WEBP"),
        ("gif", "GIF"),
        ("bmp", "BMP"),
        ("tiff", "TIFF"),
    ):
        Path(f"a.{suffix}").write_bytes(png(file_format=file_format))
    Path("a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}" + bytes(range(256)))
    with Path("huge.json").open("wb") as file:
        file.truncate(80 * 2**20)
    Path("wrong.json").write_text('{"prompts": [{"width": "wide"}]}')
    result = shell(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
    assert "s3cret" not in result.stderr
    assert not shell.server.requests


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
        status(grpc.StatusCode.UNAVAILABLE, "its pictures could not be stored", reason="STORE_UNAVAILABLE"),
        3,
        ["error: its pictures could not be stored"],
    ),
    (
        status(grpc.StatusCode.INTERNAL, "stopped 3 times", reason="ATTEMPTS_EXHAUSTED"),
        1,
        ["error: stopped 3 times", "Make the job again to run it."],
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


def test_no_reason_of_the_server_is_told_as_something_else(shell: Shell) -> None:
    codes = pytest.importorskip("chromarpc_server.transport.messages.errors").CODES
    for kind, code in codes.items():
        shell.server.script = refusing(status(code, "the server's own sentence", reason=kind.reason))
        result = shell("generate", "a")
        assert result.stderr.splitlines()[0] == "error: the server's own sentence", kind.reason
        assert (result.exit_code == 1) == (kind.reason in INTERNAL_REASONS), kind.reason


INTERNAL_REASONS = {"INTERNAL", "DEVICE_LOST", "DEVICE_HUNG", "ATTEMPTS_EXHAUSTED"}
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


def test_models(shell: Shell) -> None:
    text = shell("models").stdout
    assert (
        text.splitlines()[0]
        == "chroma       weights are missing; on the server, run: chromarpc-server fetch chroma"
    )
    assert "defaults: 1024x1024, 25 steps" in text
    assert "chroma-mini  in memory (16.8 MB)" in text
    models = json.loads(shell("models", "--json").stdout)["models"]
    assert models[1]["resident_bytes"] == 16 * 2**20
    assert models[0]["weights_present"] is False


def test_info(shell: Shell) -> None:
    text = shell("info").stdout
    assert "reference (default): the default" in text
    assert "max_prompts: 64" in text
    info = json.loads(shell("info", "--json").stdout)
    assert info["limits"]["max_pixels"] == 2**40
    assert info["version"] == "1.2.3"


def test_health(shell: Shell) -> None:
    result = shell("health", "--wait", "10")
    assert (result.exit_code, result.stdout) == (0, "SERVING\n")
    shell.server.health = health_pb2.HealthCheckResponse.NOT_SERVING
    result = shell("health", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (3, {"status": "NOT_SERVING"})


def test_the_token_comes_from_a_file_or_the_environment(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("token.txt").write_text("from-file\n")
    shell("models", "--token-file", "token.txt")
    monkeypatch.setenv("CHROMARPC_TOKEN", "from-environment")
    shell("models")
    shell("models", "--token-file", "token.txt")
    found = [metadata["authorization"] for metadata in shell.server.metadata]
    assert found == ["Bearer from-file", "Bearer from-environment", "Bearer from-file"]


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a/b.safetensors", Lora("a/b.safetensors")),
        ("a/b.safetensors:0.8", Lora("a/b.safetensors", 0.8)),
        ("a/b.safetensors:-1", Lora("a/b.safetensors", -1.0)),
        ("a:b", Lora("a:b")),
        ("a:b:2", Lora("a:b", 2.0)),
        (":1", Lora(":1")),
        ("a:", Lora("a:")),
    ],
)
def test_a_lora_may_carry_its_multiplier(text: str, lora: Lora) -> None:
    assert parse_lora(text) == lora


def test_durations_and_sizes_for_people() -> None:
    assert [seconds_text(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 185)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1:00 min", "3:05 min",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (0, 999, 1000, 17_800_000_000)] == ["0 bytes", "999 bytes", "1.0 kB", "17.8 GB"]


# As a process


def command(server: FakeServer, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", "from chromarpc.cli import main; main()", *arguments],
        env={**os.environ, "CHROMARPC_TARGET": server.target, "CHROMARPC_TRACEBACK": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def test_as_a_process(server: FakeServer, tmp_path: Path) -> None:
    process = command(server, "generate", "a", "--quiet", cwd=tmp_path)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "out.png\n", "")
    assert (tmp_path / "out.png").stat().st_size > len(png(0))


def test_ctrl_c_cancels_the_job_and_exits_130(server: FakeServer, tmp_path: Path) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        yield story.accepted(request)
        yield story.step(0, 1)
        yield from server.wait_for_end()

    server.script = script
    process = command(server, "generate", "a", "--events", cwd=tmp_path)
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "step":
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert server.ended.wait(PATIENCE_S)


def test_an_interrupt_never_reaches_the_thread_that_speaks_to_the_server() -> None:
    """There it could leave a lock of gRPC taken."""
    ended, seen = threading.Event(), []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)  # Python hands it to the main thread
            assert ended.wait(PATIENCE_S)
        except BaseException as error:
            seen.append(error)
            raise

    with pytest.raises(KeyboardInterrupt):
        interruptible(work, ended.set)
    assert ended.is_set()
    assert seen == []


def test_a_reader_that_has_enough_is_no_error_message(server: FakeServer, tmp_path: Path) -> None:
    process = command(server, "generate", "a", "--events", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(PATIENCE_S) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
