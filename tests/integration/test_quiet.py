"""On standard error is what chromarpc says, and nothing of the libraries that it imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.tiny_checkpoint import GOLDENS

COMMAND = (sys.executable, "-m", "chromarpc_server")


def test_verify_says_nothing_but_its_results(tmp_path: Path) -> None:
    (tmp_path / "formats").symlink_to(GOLDENS / "formats")
    told = subprocess.run(
        [*COMMAND, "verify", str(tmp_path)], capture_output=True, text=True, check=False, timeout=250
    )
    assert told.stderr == ""
    lines = told.stdout.splitlines()
    assert all(line.startswith(("PASS  ", "FAIL  ", "SKIP  ")) for line in lines[:-1])
    assert " passed, 0 failed, " in lines[-1]


def test_a_server_says_nothing_of_what_it_imports(tmp_path: Path) -> None:
    arguments = ("--port", "0", "--data-dir", str(tmp_path), "--preload", "chroma-mini", "--log-level", "error")
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        _, told = server.communicate(timeout=60)
    assert (first.startswith("chromarpc-server listens on "), told, server.returncode) == (True, "", 0)
