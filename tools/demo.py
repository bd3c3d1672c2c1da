"""`make demo`: a server with the bundled checkpoint, one generation through the real client, one picture."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROMPT = "a large red circle in the middle on a white background"
PICTURE = Path("demo.png")
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """A server on a free port; gives its address."""
    command = [BIN / "chromarpc-server", "--port", "0", "--preload", "chroma-mini", "--log-level", "warning"]
    command += ["--store", "memory"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            if "listens on" not in first:
                sys.exit(f"the server did not start (exit code {process.wait()})")
            yield first.split("listens on ", 1)[1].split()[0]
        finally:
            process.terminate()


def main() -> None:
    """Starts, draws, stops."""
    print("Starting a server with the bundled checkpoint …", flush=True)
    with running_server() as target:
        print(f'Asking it for "{PROMPT}"', flush=True)
        command = [BIN / "chromarpc", "generate", PROMPT, "--model", "chroma-mini", "--target", target]
        code = subprocess.run([*command, "-o", PICTURE], check=False).returncode
    if code == 0:
        print(f"The picture is {PICTURE.resolve()}")
    sys.exit(code)


if __name__ == "__main__":
    main()
