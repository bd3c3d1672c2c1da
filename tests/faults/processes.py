"""Servers in processes of their own, for tests that kill them."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromarpc


class ServerProcess:
    """A server over the tiny checkpoint, SERVING once it is made, unless told otherwise."""

    def __init__(
        self,
        checkpoint: Path,
        data_dir: Path,
        *flags: str,
        module: str = "chromarpc_server",
        awaits_serving: bool = True,
        threads: int = 2,
    ) -> None:
        """`flags`: further ones of `chromarpc-server`; `module`: what is run instead of it; `awaits_serving`: off
        where the test calls `await_serving`; `threads`: of the computation.
        """
        command = [sys.executable, "-m", module, "--port", "0", "--threads", str(threads)]
        command += [] if "--devices" in flags else ["--device", "cpu"]
        command += ["--model-folder", f"chroma-mini={checkpoint}", "--data-dir", str(data_dir), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._log: list[str] = []
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.target = ""
        if awaits_serving:
            self.await_serving()

    def await_serving(self) -> None:
        """Returns once it says where it listens, which it does once it is SERVING."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"listens on 127\.0\.0\.1:(\d+)", line)
        if found is None:
            self.close()
            raise AssertionError(f"the server did not start: {line}{self.log}")
        self.target = f"127.0.0.1:{found[1]}"

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self._log.extend(self.process.stderr)

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return "".join(self._log)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def close(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def server_process(
    checkpoint: Path,
    data_dir: Path,
    *flags: str,
    module: str = "chromarpc_server",
    awaits_serving: bool = True,
    threads: int = 2,
) -> Iterator[ServerProcess]:
    """One that is gone in the end."""
    server = ServerProcess(
        checkpoint, data_dir, *flags, module=module, awaits_serving=awaits_serving, threads=threads
    )
    try:
        yield server
    finally:
        server.close()


def until_step(events: Any, step: int = 1) -> int:
    """Waits for a step of a job. Returns the sequence of its event."""
    for event in events:
        if isinstance(event, chromarpc.Step) and event.step >= step:
            sequence: int = event.sequence
            return sequence
    raise AssertionError("the stream ended before the step")
