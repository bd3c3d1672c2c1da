"""How quickly health and ListModels answer while a generation runs: `make bench`.

Starts a server, keeps it busy with a 512×512 generation on the bundled checkpoint, and asks from another process.
Prints median, 99th percentile and worst of each, beside the same calls to the idle server.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from chromarpc import Client
from tools.demo import running_server

CALLS = 200


def _measure(call: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
        time.sleep(0.01)
    return sorted(times)


def _row(name: str, times: list[float]) -> str:
    tail = times[int(0.99 * len(times)) - 1]
    return f"{name:<28}{statistics.median(times):>9.2f}{tail:>9.2f}{times[-1]:>9.2f}"


def main() -> None:
    """Measures and prints a table in milliseconds."""
    with running_server() as target, Client(target) as client:
        print(f"{'milliseconds':<28}{'median':>9}{'p99':>9}{'worst':>9}")
        for name, call in (("health", client.health), ("ListModels", client.list_models)):
            print(_row(f"{name}, idle", _measure(call)))
            with client.generate("a", model="chroma-mini", width=512, height=512, sample_steps=150) as events:
                next(events)
                print(_row(f"{name}, generation running", _measure(call)))


if __name__ == "__main__":
    main()
