"""The `chromarpc` command as a process: what it leaves, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromarpc.cli.interrupt import interruptible
from tests.client.client_fake_server import PATIENCE_S, FakeServer, JobEvent, Request, Story, png

pytestmark = pytest.mark.slow


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
