"""Another process that holds memory of a GPU, so that as little is free as on a smaller card, and watches it.

`python -m bench.gpu_holder INDEX` is that process: it answers each line with a number of bytes.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Protocol

GIB = 1024**3
STEP_BYTES = 2 * 1024**2
"""What the driver gives memory in."""
LOOK_EVERY_S = 0.02


class Holder:
    """That process. To be started before this one has a context on the GPU, which counts as taken by then."""

    def __init__(self, index: int = 0) -> None:
        """`index`: of the GPU."""
        command = [sys.executable, "-m", "bench.gpu_holder", str(index)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.all_bytes = self._ask("leave all")
        """Free where it holds nothing, by the driver."""
        self._left = self.all_bytes

    def leave(self, free_bytes: int | None) -> int:
        """Holds all but this much, in steps of 2 MiB, or nothing. Returns what is left.

        Raises:
            MemoryError: there is not as much to hold: this process has it.
        """
        self._left = self._ask("leave all" if free_bytes is None else f"leave {free_bytes}")
        return self._left

    def peak_bytes(self) -> int:
        """The most that was taken of what is left since the last `leave`, by the driver: this process's context,
        kernels and allocations.
        """
        return self._left - self._ask("lowest")

    def close(self) -> None:
        """Lets go of everything."""
        self._process.terminate()
        self._process.wait()

    def _ask(self, line: str) -> int:
        if self._process.stdin is None or self._process.stdout is None:
            raise MemoryError("it has no pipes")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer.isdecimal():
            raise MemoryError(answer or "the process that holds the GPU's memory ended")
        return int(answer)


class Memory(Protocol):
    """Of a GPU, as this process sees it."""

    def free(self) -> int:
        """Bytes, by the driver."""
        ...

    def hold(self, size_bytes: int) -> None:
        """Holds so much more; raises RuntimeError where there is less."""
        ...

    def let_go(self) -> None:
        """Of everything that is held."""
        ...


def serve(
    memory: Memory, lines: IO[str], answers: IO[str], is_waiting: Callable[[], bool], everything: int | None = None
) -> None:
    """Answers until there are no more lines, and looks at what is free meanwhile.

    Args:
        memory: of the GPU.
        lines: `leave all`, `leave BYTES` (free), or `lowest` (free since then).
        answers: where a number goes for each, or what went wrong.
        is_waiting: waits a little for a line; whether there is one.
        everything: free where nothing is held; by default what is free now.
    """
    everything = memory.free() if everything is None else everything
    held, lowest = 0, everything
    while True:
        if not is_waiting():
            lowest = min(lowest, memory.free())
            continue
        line = lines.readline()
        if not line:
            return
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "leave":
                wanted = 0 if argument == "all" else (everything - int(argument)) // STEP_BYTES * STEP_BYTES
                if wanted < held:
                    memory.let_go()
                    held = 0
                if wanted > held:
                    memory.hold(wanted - held)
                    held = wanted
                lowest = memory.free()
                answer = str(everything - held)
            else:
                answer = str(min(lowest, memory.free()))
        except RuntimeError as error:
            answer = str(error).splitlines()[0]
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    """The process."""
    import torch  # noqa: PLC0415 - this one only

    index = int(sys.argv[1])
    torch.cuda.set_device(index)
    blocks = [torch.zeros(1, device="cuda")]  # makes the context

    class Gpu:
        def free(self) -> int:
            return int(torch.cuda.mem_get_info(index)[0])

        def hold(self, size_bytes: int) -> None:
            blocks.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))

        def let_go(self) -> None:
            del blocks[1:]
            torch.cuda.empty_cache()

    def is_waiting() -> bool:
        return bool(select.select([sys.stdin], [], [], LOOK_EVERY_S)[0])

    serve(Gpu(), sys.stdin, sys.stdout, is_waiting)


if __name__ == "__main__":
    main()
