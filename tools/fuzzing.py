"""What the searches for files that break a reader have in common: limits, the loop, and what is kept."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MAX_SECONDS = 10
MAX_MEMORY_BYTES = 1024**3
"""Beyond what the process has when fuzzing starts."""


def options(description: str | None) -> argparse.Namespace:
    """`minutes` and `seed` of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer."""

    def expired(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def search(
    name: str, cases: Iterable[tuple[bytes, Callable[[], str]]], path: Path, *, minutes: float, seed: int
) -> None:
    """Judges file after file, within limits, and prints what was made of them.

    Args:
        name: how a file begins that is kept.
        cases: each file's bytes, and what judges it once they are at `path`: gives the outcome, or raises.
        path: where files are put.
        minutes: how long.
        seed: of the cases.

    Raises:
        BaseException: what a file ended with that must not; the file is kept in `out/`.
    """
    torch.set_num_threads(1)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    begun = time.monotonic()
    for raw, judge in cases:
        if time.monotonic() - begun > 60 * minutes:
            break
        path.unlink(missing_ok=True)  # another file, not another version of one that somebody has open
        path.write_bytes(raw)
        started = time.monotonic()
        try:
            with time_limit(MAX_SECONDS):
                outcomes[judge()] += 1
        except BaseException:
            kept = Path("out") / f"{name}-{seed}-{outcomes.total()}{path.suffix}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(raw)
            print(f"found after {outcomes.total()} files, kept as {kept}", file=sys.stderr)
            raise
        slowest = max(slowest, time.monotonic() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(
        f"nothing found in {outcomes.total()} files, {(time.monotonic() - begun) / 60:.1f} minutes, seed {seed}: "
        f"{counts}; slowest {1000 * slowest:.0f} ms, peak resident {peak:.0f} MiB"
    )
