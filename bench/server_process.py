"""Servers in processes of their own, and what Linux tells of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerProcess:
    """What Linux tells of a process."""

    pid: int

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident now."""
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="utf-8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def started(command: Sequence[str], cores: set[int] | None) -> Iterator[tuple[str, ServerProcess]]:
    """A server on some cores, or all: its address and process."""
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores))), *command] if cores else [*command]
    with subprocess.Popen(pinned, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "listens on" not in line:
                sys.exit(f"the server did not start (exit code {process.wait()})")
            yield line.split("listens on ", 1)[1].split()[0], ServerProcess(process.pid)
        finally:
            process.terminate()
