"""The `chromarpc` command: what it sends, saves, prints and answers to the shell."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from PIL import Image
from rich.console import Console

from chromarpc import Lora, parse_request_json
from chromarpc.cli import progress
from chromarpc.cli.progress import Bars, bytes_text, seconds_text
from chromarpc.cli.request import parse_lora
from chromarpc.request import build_request
from chromarpc.stream import StreamReader
from chromarpc.v1 import generation_service_pb2, job_event_pb2
from tests.client.client_fake_server import JobEvent, Request, Story, png, whole_job
from tests.client.shell import Shell, files

GOLDENS = Path(__file__).parent.parent / "goldens" / "requests" / "reference_requests.json"


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


def test_models(shell: Shell) -> None:
    text = shell("models").stdout
    assert (
        text.splitlines()[0]
        == "chroma       weights are missing; on the server, run: chromarpc-server fetch chroma"
    )
    assert "defaults: 1024x1024, 25 steps" in text
    for line in (
        "transformer: org/chroma:chroma.gguf is missing",
        "text encoder: t5.gguf, GGUF Q8_0",
        "autoencoder: ae.sft cannot be used: it has 4 latent channels",
        "adapters for it name lodestones/Chroma1-HD as their base",
    ):
        assert line in text
    assert "chroma-mini  in memory (16.8 MB) of cpu" in text
    assert "prepared: no adapters, exact (1.0 MB) on cpu" in text
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
