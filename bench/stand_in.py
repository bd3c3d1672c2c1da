"""A real server on devices that compute nothing: `python -m bench.stand_in --count 8 [flags of the server]`.

Each is a thread that does at every step what a GPU's does to the interpreter: it holds it for a moment, to give
the GPU its work, and waits for the rest of the step. What the server is slower than its devices, the front costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from chromarpc_server import __main__ as command_line
from chromarpc_server import app
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import DeviceError
from chromarpc_server.domain.events import Prepared, Step, Timings, TokenCount, WeightsReport, WeightsSource
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.device import Device, DeviceSource
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.work import Emit, Pixels, RenderedImage, Report, Work, WorkDone


@dataclass(frozen=True)
class StepShape:
    """What a step is to the host."""

    step_s: float
    held_s: float
    """Of it, in which Python runs on the device's thread."""
    side_px: int
    """Of the images that come out."""


class StandIn:
    """A device that only takes time."""

    def __init__(self, index: int, shape: StepShape, lags: list[float]) -> None:
        self.description = DeviceDescription(f"stand-in:{index}", "stand-in", 0, "float32")
        self.snapshot = CacheSnapshot()
        self._shape = shape
        self._lags = lags
        self._image = _image(shape.side_px)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"stand-in:{index}")

    async def open(self) -> DeviceDescription:
        return self.description

    async def load(
        self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]] = ()
    ) -> None:
        pass

    async def run(self, work: Work, emit: Emit) -> WorkDone:
        loop = asyncio.get_running_loop()

        def arrived(sent_s: float, report: Report) -> None:
            self._lags.append(time.perf_counter() - sent_s)
            emit(report)

        def hand_over(report: Report) -> None:
            loop.call_soon_threadsafe(arrived, time.perf_counter(), report)

        return await loop.run_in_executor(self._thread, self._draw, work, hand_over)

    async def lost(self) -> DeviceError:
        never: asyncio.Future[DeviceError] = asyncio.get_running_loop().create_future()
        return await never

    def has_parsed(self, file: AdapterFile) -> bool:  # noqa: ARG002 - the protocol's
        return False

    def memory_used_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _draw(self, work: Work, emit: Emit) -> WorkDone:
        begun = time.perf_counter()
        nothing = WeightsReport(WeightsSource.RESIDENT, 0, 0.0, 1, 0)
        tokens = tuple(TokenCount(4, 0) for _ in work.plan.prompts)
        emit(Prepared((), "", tokens, {}, "stand-in", nothing, (), self.description.id))
        for index, prompt in enumerate(work.plan.prompts):
            for step in range(1, prompt.sample_steps + 1):
                work.cancellation.check()
                duration_s = self._step()
                left = prompt.sample_steps - step
                emit(Step(index, step, prompt.sample_steps, 0.5, 500.0, duration_s, left * duration_s))
            emit(RenderedImage(index, prompt.seed, self._image))
        return WorkDone(Timings(denoising_s=time.perf_counter() - begun), 0)

    def _step(self) -> float:
        begun = time.perf_counter()
        held_until = time.thread_time() + self._shape.held_s
        while time.thread_time() < held_until:
            pass
        time.sleep(max(0.0, begun + self._shape.step_s - time.perf_counter()))
        return time.perf_counter() - begun


class StandIns:
    """As many as are asked for."""

    waits_for_more = False
    profiles = ("reference",)

    def __init__(self, count: int, shape: StepShape, lags_file: Path | None) -> None:
        self._lags: list[float] = []
        self._lags_file = lags_file
        self._devices = [StandIn(index, shape, self._lags) for index in range(count)]

    async def open(self, join: Callable[[Device], None]) -> None:
        for device in self._devices:
            join(device)

    def missing(self) -> str:
        return ""

    def refuse(self, device: Device, error: DeviceError) -> None:
        """Does not happen: nothing joins later."""

    def close(self) -> None:
        """Says how late reports came from the threads to the event loop."""
        if self._lags_file is not None:
            self._lags_file.write_text(json.dumps(self._lags))


def _image(side_px: int) -> Pixels:
    """Takes a PNG encoder about as long as a drawn one: smooth, with a little noise."""
    ramp = np.linspace(0, 200, side_px)
    smooth = ramp[:, None, None] * 0.5 + ramp[None, :, None] * np.array([0.5, 0.3, 0.1])
    noise = np.random.default_rng(1).normal(0, 3, smooth.shape)
    pixels: Pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return pixels


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=33.0)
    parser.add_argument("--held-ms", type=float, default=1.0)
    parser.add_argument("--side-px", type=int, default=512)
    parser.add_argument("--lags", type=Path, help="where the seconds are written that reports came late")
    arguments, flags = parser.parse_known_args()
    shape = StepShape(arguments.step_ms / 1000, arguments.held_ms / 1000, arguments.side_px)

    def stand_ins(*_: object) -> DeviceSource:
        return StandIns(arguments.count, shape, arguments.lags)

    with mock.patch.object(app, "device_source", stand_ins):
        command_line.main(["serve", *flags])


if __name__ == "__main__":
    main()
