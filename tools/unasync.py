"""Writes the blocking client from the asyncio one, or checks that what is committed is current (`--check`).

A line that ends with `# async only` is left out, with all that is indented below it. `PHRASES` says what the
documentation has otherwise, `WORDS` what the code has. What differs by more than that is written by hand on both
sides, with the same names: `_async/concurrency.py` and `_async/leaving.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENT = "client/chromarpc"
FILES: Mapping[str, str] = {
    f"{CLIENT}/aio.py": f"{CLIENT}/client.py",
    f"{CLIENT}/_async/calls.py": f"{CLIENT}/_sync/calls.py",
    f"{CLIENT}/_async/event_stream.py": f"{CLIENT}/_sync/event_stream.py",
    f"{CLIENT}/_async/image_reading.py": f"{CLIENT}/_sync/image_reading.py",
    f"{CLIENT}/_async/serving.py": f"{CLIENT}/_sync/serving.py",
    f"{CLIENT}/_async/uploading.py": f"{CLIENT}/_sync/uploading.py",
}
"""What is written by hand, and what is made from it."""

MARK = "# async only"
PHRASES: Sequence[tuple[str, str]] = (
    (
        '"""The asyncio client: the same calls and events as `chromarpc.client`, awaited."""',
        '"""The blocking client."""',
    ),
    (
        "Speaks to one server from one event loop.",
        "Speaks to one server; its methods may be called from several threads at once.",
    ),
    ("Opens its channel with the first call.", "Opens its connection with the first call."),
    (
        """Checks the arguments, which are those of `Client`; connects to nothing yet.

        Raises:""",
        """Makes the channel; connects to nothing yet.

        Args:
            target: `host:port`, or any other gRPC target.
            token: sent with every call as `authorization: Bearer`; only over TLS or to this machine.
            tls: True checks the server against well-known authorities; `TlsOptions` says more.
            timeout_s: deadline of calls that name none themselves. Without it generations have none, and the
                short calls 10 s.
            allow_insecure_token: send the token in plain text even to another machine.

        Raises:""",
    ),
    (
        """(`async with`, `aclose()`, cancelling the task that waits, or dropping the last
    reference) cancels the call, and the server stops within one step. A job that was made with `detach`""",
        """(`with`, `close()`, or dropping the last reference) cancels the call, and the
    server stops within one step. A job that was made with `detach`""",
    ),
    (
        "            call: the call.\n",
        "            call: at once an iterator and a grpc.Call, which the stubs cannot say.\n",
    ),
    (
        "Cancels the call; whoever waits for an event gets `Cancelled`.",
        "Cancels the call, from any thread; whoever waits for an event gets `Cancelled`.",
    ),
    (
        "The same, for `contextlib.aclosing`; returns once the server knows, where it has to be told.",
        "Ends the iteration, cancelling the call if it still runs.",
    ),
    (", whose stubs have no types for asyncio", ""),
)
"""Documentation: each is found once in one of the files, before the words are replaced."""
WORDS: Sequence[tuple[str, str]] = (
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"Async(?=[A-Z])", ""),
    (r"__a(?=(enter|exit|iter|next)__)", "__"),
    (r"\baclose\b", "close"),
    (r"\b_async\b", "_sync"),
    (r"\bgrpc\.aio\b", "grpc"),
    (r"\basyncio\.Future\[None\]", "threading.Event"),
    (r"\bimport asyncio\b", "import threading"),
)
"""Patterns and what takes their place, in this order."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    stale = [target for target, text in generated().items() if _differs(ROOT / target, text)]
    if not stale:
        return 0
    if "--check" in arguments:
        print(f"{', '.join(stale)}: not current: run `make sync-client`", file=sys.stderr)
        return 1
    for target, text in generated().items():
        (ROOT / target).write_text(text, encoding="utf-8")
    return 0


def generated() -> dict[str, str]:
    """The text of each file that is generated.

    Raises:
        ValueError: a phrase is not found once, or a word is left that only asyncio knows.
    """
    sources = {source: (ROOT / source).read_text(encoding="utf-8") for source in FILES}
    for phrase, _ in PHRASES:
        if sum(text.count(phrase) for text in sources.values()) != 1:
            raise ValueError(f"not found once in {', '.join(sources)}: {phrase!r}")
    return {
        target: formatted(
            f"# Generated from {source} by tools/unasync.py: do not edit.\n{blocking(sources[source])}", target
        )
        for source, target in FILES.items()
    }


def blocking(text: str) -> str:
    """The same code without asyncio.

    Raises:
        ValueError: a word is left that only asyncio knows.
    """
    text = without_marked(text)
    for phrase, replacement in PHRASES:
        text = text.replace(phrase, replacement)
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    left = re.search(r".*(async|await|aio\b).*", text, re.IGNORECASE)
    if left is not None:
        raise ValueError(f"no blocking counterpart is known of: {left.group().strip()}")
    return text


def without_marked(text: str) -> str:
    """Leaves out the lines that end with `MARK`, and what is indented below them."""
    kept: list[str] = []
    below: int | None = None
    for line in text.splitlines(keepends=True):
        indent = len(line) - len(line.lstrip())
        if below is not None and (not line.strip() or indent > below):
            continue
        below = indent if line.rstrip().endswith(MARK) else None
        if below is None:
            kept.append(line)
    return "".join(kept)


def formatted(text: str, filename: str) -> str:
    """As `make format` leaves a file of that name."""
    for command in (["check", "--fix", "--quiet", "--select", "I,F401"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", filename, "-"]
        text = subprocess.run(
            ruff, input=text, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, check=True
        ).stdout
    return text


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_text(encoding="utf-8") != text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
