"""Where files go is checked before anything is sent; what cannot be written after all is not lost."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from chromarpc.cli import app
from tests.client.client_fake_server import FakeServer, JobEvent, Request, whole_job

SWEEP = ("sweep", "a cat", "--lora", "a.safetensors:0,1")
COMMANDS = [("generate", "a cat"), SWEEP, ("job", "watch", "job-1")]
UNUSABLE = [
    ("s.foo", "name a file that ends in .png"),
    ("s", "name a file that ends in .png"),
    ("no/such/s.png", "there is no such folder"),
    ("plain.txt/s.png", "is not a folder"),
    ("folder.png", "is a folder"),
    ("x" * 300 + ".png", "File name too long"),
    ("loop.png/s.png", "symbolic links"),
    pytest.param(
        "/proc/s.png",
        "cannot be written",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="has no /proc"),
    ),
]


class Shell:
    """Runs the command against one server, in a folder of its own."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": self.server.target})


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").touch()
    Path("folder.png").mkdir()
    Path("loop.png").symlink_to("loop.png")
    return Shell(server)


class FullDisk:
    """Takes files and none of their bytes, so many times; then it has room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int = 1000) -> None:
        self._open = os.fdopen
        self._times = times
        monkeypatch.setattr("chromarpc.images.os.fdopen", self._opened)

    def _opened(self, descriptor: int, mode: str) -> Any:
        self._times -= 1
        if self._times < 0:
            return self._open(descriptor, mode)
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(("output", "told"), UNUSABLE)
def test_an_output_that_cannot_be_written_costs_nothing(
    shell: Shell, command: tuple[str, ...], output: str, told: str
) -> None:
    result = shell(*command, "-o", output)
    assert (result.exit_code, shell.server.requests) == (2, [])
    assert told in result.stderr
    assert "bug" not in result.stderr


def test_a_preview_folder_that_cannot_be_written_costs_nothing(shell: Shell) -> None:
    for folder in ("plain.txt", "plain.txt/p", "loop.png"):
        result = shell("generate", "a", "--preview-dir", folder)
        assert (result.exit_code, shell.server.requests) == (2, [])


def test_a_disk_that_is_full_before_is_told_before(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    for command in COMMANDS:
        result = shell(*command, "-o", "s.png")
        assert (result.exit_code, shell.server.requests) == (2, [])
        assert "No space left on device" in result.stderr


def test_a_picture_that_cannot_be_saved_stays_with_the_server(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []

    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        yield from whole_job(request, context)
        finished.append(True)

    shell.server.script = script
    Path("out-0.png").write_text("old")
    FullDisk(monkeypatch, times=1)
    result = shell("generate", "a", "b")
    assert result.exit_code == 1
    assert finished == [True]
    assert "error: out-0.png: No space left on device" in result.stderr
    assert "chromarpc job watch job-1 -o FILE" in result.stderr
    assert "saved image 0" not in result.stderr
    # The other one had room; nothing is left half done.
    assert result.stdout == "out-1.png\n"
    assert Path("out-0.png").read_text() == "old"
    assert sorted(path.name for path in Path().glob("[!lpf]*")) == ["out-0.png", "out-1.png"]


def test_a_preview_that_cannot_be_saved_ends_no_generation(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, times=2)
    result = shell("generate", "a", "--preview-dir", "p", "--preview-every", "1")
    assert result.exit_code == 1
    assert result.stdout == "out.png\n"
    assert result.stderr.count("No space left on device") == 1


def test_a_sheet_that_cannot_be_saved_is_elsewhere(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.png").write_text("old")
    FullDisk(monkeypatch, times=1)
    result = shell(*SWEEP, "-o", "s.png")
    assert (result.exit_code, Path("s.png").read_bytes()) == (1, b"old")
    first, second = result.stderr.splitlines()[-2:]
    assert first == "error: s.png: No space left on device"
    with Image.open(second.removeprefix("The sheet is in ")) as sheet:
        sheet.load()


def test_a_sheet_that_can_be_saved_nowhere_says_where_the_pictures_are(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch)
    result = shell(*SWEEP)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "error: sweep.png: No space left on device\nThe server keeps the pictures: chromarpc job ls\n"
    )


@pytest.mark.parametrize("command", [("generate", "a"), SWEEP], ids=["generate", "sweep"])
def test_the_longest_name_that_a_file_may_have_can_be_written(shell: Shell, command: tuple[str, ...]) -> None:
    longest = "x" * 251 + ".png"
    assert shell(*command, "-o", longest).exit_code == 0
    assert Path(longest).is_file()


@pytest.mark.parametrize(("name", "image_format"), [("s.jpg", "JPEG"), ("s.webp", "WEBP"), ("s.PNG", "PNG")])
def test_a_sheet_comes_in_the_format_of_its_name(shell: Shell, name: str, image_format: str) -> None:
    assert shell(*SWEEP, "-o", name).exit_code == 0
    with Image.open(name) as sheet:
        assert sheet.format == image_format


def test_a_sheet_too_large_for_its_format_costs_nothing(shell: Shell) -> None:
    lora = "a.safetensors:" + ",".join(["1"] * 100)
    result = shell("sweep", "a", "--lora", lora, "-o", "s.webp")
    assert (result.exit_code, shell.server.requests) == (2, [])
    assert "more than a webp can hold" in result.stderr
