"""`chromarpc generate --detach` and `chromarpc job`, against a real server."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import chromarpc
from chromarpc.cli import app
from chromarpc.cli.exits import ExitCode
from tests.conftest import RunningServer

SMALL = ["--model", "chroma-mini", "--width", "64", "--height", "64", "--steps", "2"]
LONG = ["--model", "chroma-mini", "--width", "256", "--height", "256", "--steps", "150"]


class Shell:
    """Runs commands against one server."""

    def __init__(self, target: str) -> None:
        self._target = target

    def __call__(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": self._target, "NO_COLOR": "1"})

    def detach(self, *arguments: str) -> str:
        result = self("generate", "--detach", *arguments)
        assert result.exit_code == 0, result.stderr
        (job_id,) = result.stdout.split()
        return str(job_id)


@pytest.fixture
def shell(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(server.target)


def test_a_detached_job_is_watched_to_its_pictures_and_again_after_it_ended(shell: Shell) -> None:
    job_id = shell.detach("a red circle", "a blue square", *SMALL, "--format", "webp", "--preview-every", "1")
    first = shell("job", "watch", job_id, "--preview-dir", "p")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.split() == ["out-0.webp", "out-1.webp"]
    assert sorted(path.name for path in Path("p").iterdir()) == ["preview-0-001.png", "preview-1-001.png"]
    again = shell("job", "watch", job_id, "-o", "{index}-{seed}.webp", "--events")
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["event"] for event in events][:1] + [event["event"] for event in events][-1:] == [
        "accepted",
        "completed",
    ]
    assert Path("0-42.webp").read_bytes() == Path("out-0.webp").read_bytes()
    assert Path("1-43.webp").read_bytes() == Path("out-1.webp").read_bytes()


def test_the_picture_is_the_one_that_generate_draws(shell: Shell) -> None:
    assert shell("generate", "a red circle", *SMALL, "--format", "webp", "-o", "direct.webp").exit_code == 0
    job_id = shell.detach("a red circle", *SMALL, "--format", "webp")
    assert shell("job", "watch", job_id, "-q").exit_code == 0
    assert Path("out.webp").read_bytes() == Path("direct.webp").read_bytes()


def test_a_job_is_drawn_again_to_the_same_picture(shell: Shell) -> None:
    job_id = shell.detach("a red circle", *SMALL, "--seed", "-1")
    running = shell.detach("a", *LONG)
    too_early = shell("job", "redraw", running)
    shell("job", "cancel", running)
    assert too_early.exit_code == ExitCode.NOT_READY
    assert "it is still being drawn" in too_early.stderr
    assert shell("job", "watch", job_id, "-q", "-o", "before.png").exit_code == 0
    again = shell("job", "redraw", job_id, "-o", "after.png")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.split() == ["after.png"]
    assert Path("after.png").read_bytes() == Path("before.png").read_bytes()
    (new_id,) = shell("job", "redraw", job_id, "--detach").stdout.split()
    assert new_id != job_id
    assert shell("job", "watch", new_id, "-q", "-o", "later.png").exit_code == 0
    assert Path("later.png").read_bytes() == Path("before.png").read_bytes()


def test_a_redraw_that_cannot_be_saved_makes_no_job(shell: Shell) -> None:
    job_id = shell.detach("a", *SMALL)
    assert shell("job", "watch", job_id, "-q").exit_code == 0
    before = shell("job", "ls").stdout
    for wrong in (["-o", "a.jpg"], ["-o", "nowhere/a.png"], ["--detach", "--events"]):
        assert shell("job", "redraw", job_id, *wrong).exit_code == ExitCode.INVALID
    assert shell("job", "ls").stdout == before


def test_jobs_are_listed_shown_cancelled_and_forgotten(shell: Shell, server: RunningServer) -> None:
    running, waiting = shell.detach("one", *LONG), shell.detach("two\n lines", *LONG)
    while ": queued" in shell("job", "show", running).stdout:
        pass
    waits = next(line for line in shell("job", "ls", "--state", "queued").stdout.splitlines() if waiting in line)
    assert waits.split(maxsplit=3)[3] == "queued, number 1   two lines"
    told = shell("job", "show", waiting).stdout
    assert "256x256, 150 steps, guidance 4, seed 42" in told
    kept = shell("job", "rm", running)
    assert (kept.exit_code, "not ended" in kept.stderr or "has not" in kept.stderr) == (ExitCode.NOT_READY, True)
    assert shell("job", "cancel", running, waiting).exit_code == 0
    watched = shell("job", "watch", running)
    assert (watched.exit_code, "cancelled" in watched.stderr) == (ExitCode.STOPPED, True)
    listed = json.loads(shell("job", "ls", "--json", "--state", "cancelled").stdout)["jobs"]
    found = next(job for job in listed if job["job_id"] == waiting)
    assert (found["state"], found["start_time"], found["plan"]["prompts"][0]["seed"]) == (
        "JOB_STATE_CANCELLED",
        None,
        42,
    )
    assert shell("job", "rm", running, waiting).exit_code == 0
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.NotFound):
        client.get_job(waiting)


def test_json_of_a_job_has_its_pictures(shell: Shell) -> None:
    job_id = shell.detach("a", *SMALL)
    assert shell("job", "watch", job_id, "-q").exit_code == 0
    job = json.loads(shell("job", "show", "--json", job_id).stdout)
    assert job["state"] == "JOB_STATE_SUCCEEDED"
    assert job["failure"] is None
    assert job["end_time"].endswith("Z")
    with chromarpc.Client(shell._target) as client:
        data = client.get_image_bytes(job_id)
    assert [image["sha256"] for image in job["images"]] == [hashlib.sha256(data).hexdigest()]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["generate", "--detach", "a", "-o", "a.png", "--timeout", "3"],
            ExitCode.INVALID,
            "leave out -o, --timeout",
        ),
        (["generate", "--detach"], ExitCode.INVALID, "say what to draw"),
        (["generate", "--detach", "a", "--width", "3"], ExitCode.INVALID, "prompts.0.width"),
        (["job", "watch", "nothing"], ExitCode.INVALID, "there is no such job"),
        (["job", "show", "nothing"], ExitCode.INVALID, "job_id"),
        (["job", "cancel", "nothing"], ExitCode.INVALID, "job_id"),
        (["job", "redraw", "nothing"], ExitCode.INVALID, "there is no such job"),
        (["job", "ls", "--state", "lost"], ExitCode.INVALID, "queued"),
    ],
)
def test_what_cannot_be_done_is_said(shell: Shell, arguments: list[str], code: ExitCode, says: str) -> None:
    result = shell(*arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert list(Path().iterdir()) == []


def test_a_wrong_name_is_said_before_anything_is_fetched(shell: Shell) -> None:
    job_id = shell.detach("a", *SMALL, "--format", "jpeg")
    result = shell("job", "watch", job_id, "-o", "a.png")
    assert (result.exit_code, "the request says jpeg" in result.stderr) == (ExitCode.INVALID, True)
    assert list(Path().iterdir()) == []
