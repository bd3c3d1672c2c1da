"""Seconds that a client sees, beside what the pipeline takes: `python -m bench.service [--folder DIR]`.

Starts a real server and drives it with the real client: ten requests of mixed sizes and prompt lengths, one image
each. With `--folder`, of a full-size checkpoint as `python -m bench.synthetic DIR` writes it; else of chroma-mini.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict

import chromarpc
from bench.machine import commit
from chromarpc import Client
from chromarpc.events import Completed, ImageReady, Loading, Prepared, Preview, Step

WORDS = ("red", "fox", "in", "the", "snow", "at", "early", "morning", "with", "a", "soft", "light")


@dataclass(frozen=True)
class Served:
    """One request as the client saw it."""

    width: int
    height: int
    tokens: int
    profile: str
    client_s: float
    pipeline_s: float
    """Text, denoising and decoding, by the server's clock."""
    encoding_s: float
    """PNG, on another thread than the GPU's."""
    overhead_ms: float
    """What the client waited beyond pipeline and PNG."""
    first_step_s: float
    step_ms: float
    steps: int
    previews: int
    peak_gb: float


class DeviceMemory:
    """The most memory of the GPU that was in use while it was open, as the driver counts it."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeviceMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def peak_gb(self) -> float:
        """So far; 0 without a GPU."""
        return self._peak

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._done.wait(0.3):
            try:
                told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
            except (OSError, subprocess.SubprocessError):
                return
            self._peak = max(self._peak, float(told.split()[0]) * 1024**2 / 1e9)


@contextmanager
def server(arguments: list[str], cache: Path) -> Iterator[tuple[str, float]]:
    """A server process on a free port: its address, and seconds until it served."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "listens on" not in line:
                sys.exit(f"the server did not start (exit code {process.wait()})")
            yield line.split("listens on ", 1)[1].split()[0], time.perf_counter() - begun
        finally:
            process.terminate()


def ask(client: Client, model: str, size: tuple[int, int], words: int, **options: object) -> Served:
    """One request."""
    width, height = size
    prompt = " ".join(WORDS[index % len(WORDS)] for index in range(words))
    begun = time.perf_counter()
    first, durations, previews, done, tokens, received = 0.0, [], 0, None, 0, 0.0
    with client.generate(prompt, model=model, width=width, height=height, seed=words, **options) as events:  # type: ignore[arg-type]
        profile = ""
        for event in events:
            match event:
                case chromarpc.Accepted():
                    profile = event.profile
                case Prepared():
                    tokens = event.token_counts[0].used
                case Step():
                    first = first or time.perf_counter() - begun
                    durations.append(event.duration_s)
                case Preview():
                    previews += 1
                case ImageReady():
                    received = time.perf_counter() - begun
                case Completed():
                    done = event
                case Loading() | _:
                    pass
    assert done is not None
    timings = done.timings
    pipeline_s = timings.text_encoding_s + timings.denoising_s + timings.decoding_s
    return Served(
        width,
        height,
        tokens,
        profile,
        received,
        pipeline_s,
        timings.image_encoding_s,
        1000 * (received - pipeline_s - timings.image_encoding_s - timings.loading_s),
        first,
        1000 * sorted(durations)[len(durations) // 2],
        len(durations),
        previews,
        done.peak_memory_bytes / 1e9,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="full-size checkpoint")
    parser.add_argument("--device-memory", help="such as 12GB")
    parser.add_argument("--profiles", nargs="+", default=["reference"])
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--sizes", nargs="+", help="such as 1024x1024, in turn")
    parser.add_argument("--no-previews", action="store_true", help="do not measure what previews cost")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = "chroma" if arguments.folder else "chroma-mini"
    flags = ["--preload", model, "--log-level", "info"]
    sizes = [(256, 256), (320, 192), (192, 320)]
    if arguments.folder:
        flags += ["--model-folder", f"chroma={arguments.folder}"]
        sizes = [(1024, 1024), (512, 512), (768, 1344)]
    if arguments.sizes:
        sizes = [(int(width), int(height)) for width, height in (size.split("x") for size in arguments.sizes)]
    for width, height in sizes:
        flags += ["--warm-up", f"{width}x{height}"]
    if arguments.device_memory:
        flags += ["--device-memory", arguments.device_memory]
    served: list[Served] = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(os.environ.get("TRITON_CACHE_DIR", Path(scratch) / "triton"))
        with (
            DeviceMemory() as memory,
            server([*flags, "--data-dir", f"{scratch}/data"], cache) as (target, started),
            Client(target) as client,
        ):
            compiled = sum(1 for _ in cache.rglob("*")) if cache.is_dir() else 0
            print(f"serving after {started:.1f} s, {compiled} compiled files")
            information = client.server_info()
            device, versions = information.device.name, information.library_versions
            plan = next(m for m in client.list_models() if m.id == model).memory_plan
            print(f"memory plan: {str(plan).replace(chr(10), ' ')}")
            print(f"{'profile':10}{'size':>10}{'tokens':>7}{'client s':>9}{'pipeline':>9}{'png':>7}", end="")
            print(f"{'over ms':>8}{'first s':>8}{'ms/step':>8}{'GB':>6}")
            for index in range(arguments.requests):
                profile = arguments.profiles[index % len(arguments.profiles)]
                s = ask(client, model, sizes[index % len(sizes)], 6 + 9 * index, profile=profile)
                served.append(s)
                print(
                    f"{s.profile:10}{f'{s.width}x{s.height}':>10}{s.tokens:>7}{s.client_s:>9.3f}{s.pipeline_s:>9.3f}"
                    f"{s.encoding_s:>7.3f}{s.overhead_ms:>8.1f}{s.first_step_s:>8.3f}{s.step_ms:>8.2f}{s.peak_gb:>6.1f}",
                    flush=True,
                )
            slower = None
            if not arguments.no_previews:
                plain = [ask(client, model, sizes[0], 20) for _ in range(3)]
                shown = [ask(client, model, sizes[0], 20, preview_every=1) for _ in range(3)]
                slower = min(s.client_s for s in shown) / min(s.client_s for s in plain) - 1
                print(f"previews at every step: {100 * slower:+.1f} %")
            after = sum(1 for _ in cache.rglob("*")) if cache.is_dir() else 0
            print(f"compiled after warm-up: {after - compiled} files; device memory {memory.peak_gb():.1f} GB")
    if arguments.out:
        result = {
            "bench": "service",
            "device": device,
            "versions": dict(versions),
            "commit": commit(),
            "device_memory_limit": arguments.device_memory,
            "serving_after_s": started,
            "compiled_after_warm_up": after - compiled,
            "previews_cost": slower,
            "device_memory_gb": memory.peak_gb(),
            "memory_plan": MessageToDict(plan, preserving_proto_field_name=True),
            "requests": [asdict(s) for s in served],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
