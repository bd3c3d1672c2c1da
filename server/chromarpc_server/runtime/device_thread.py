"""A device and the one thread that touches it, as the event loop sees them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.devices import DeviceDescription, set_current_device_id
from chromarpc_server.domain.errors import DeviceError, DeviceHung, DeviceLost
from chromarpc_server.domain.limits import Budgets, DeviceTimeouts
from chromarpc_server.pipeline import (
    CheckpointFiles,
    DeviceChoice,
    compute_with,
    cpu_threads,
    describe_device,
    select_device,
    translate_memory_error,
    used_memory_bytes,
)
from chromarpc_server.pipeline.precision import PRODUCT_PRECISION
from chromarpc_server.runtime.host_share import HostShare
from chromarpc_server.runtime.model_cache import CacheSnapshot, ModelCache
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.watchdog import Watchdog
from chromarpc_server.runtime.work import Emit, Report, Work, WorkDone
from chromarpc_server.runtime.worker import DeviceWorker

_T = TypeVar("_T")


class DeviceThread:
    """Runs work on one device, in the order in which it is given."""

    def __init__(
        self,
        choice: DeviceChoice,
        running_time: RunningTime,
        budgets: Budgets | None = None,
        timeouts: DeviceTimeouts | None = None,
        share: HostShare | None = None,
    ) -> None:
        """Starts nothing; see `open`.

        Args:
            choice: the device and its dtype.
            running_time: of the event loop that gives it work, started by whoever has both.
            budgets: how much may be resident there.
            timeouts: how long each thing may take before the device is taken to hang.
            share: what it has in common with other devices of this host; by default nothing.
        """
        self._choice = choice
        self._budgets = budgets or Budgets()
        self._share = share or HostShare.within(self._budgets)
        self._cpu_threads = cpu_threads()
        """Of the thread that set it up, which read the settings."""
        self._watchdog = Watchdog(timeouts or DeviceTimeouts(), running_time, device_id=choice.id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._thread_id = 0
        """Once it runs."""
        self._snapshot = CacheSnapshot()
        self._opened: tuple[DeviceWorker, DeviceDescription] | None = None

    async def open(self) -> DeviceDescription:
        """Opens the device.

        Raises:
            ChromaError: it cannot be used.
        """
        loop = asyncio.get_running_loop()
        self._opened = await loop.run_in_executor(self._thread, self._open, loop)
        return self.description

    async def load(
        self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Makes a model resident, warmed up for images of these sizes (width, height in pixels).

        Raises:
            WeightsInvalid, OutOfMemory: it cannot be loaded.
            DeviceError: the device is lost or hangs.
        """
        call = partial(self._worker.load, model_id, files, profile, sizes)
        await self._guarded(asyncio.get_running_loop().run_in_executor(self._thread, call))

    async def run(self, work: Work, emit: Emit) -> WorkDone:
        """Does the work.

        Args:
            work: what to do.
            emit: called on the event loop with every report, before this returns; after a `DeviceHung` the thread
                may go on and report more.

        Raises:
            ChromaError: what ended it early; a `DeviceError` where the device is lost or hangs.
        """
        loop = asyncio.get_running_loop()

        def hand_over(report: Report) -> None:
            loop.call_soon_threadsafe(emit, report)

        run = partial(self._worker.run, work, hand_over)
        return await self._guarded(loop.run_in_executor(self._thread, run))

    async def _guarded(self, work: Awaitable[_T]) -> _T:
        try:
            return await self._watchdog.guard(work)
        except DeviceHung:
            # It may hang where other devices' threads wait for it.
            PRODUCT_PRECISION.forget(self._thread_id)
            raise

    async def lost(self) -> DeviceError:
        """Never returns: whether a device still works shows once it is to do something."""
        never: asyncio.Future[DeviceError] = asyncio.get_running_loop().create_future()
        return await never

    def has_parsed(self, file: AdapterFile) -> bool:
        """Whether an adapter is parsed on this host, for whichever of its devices; any thread may ask."""
        return self._share.adapters.has_parsed(file)

    @property
    def description(self) -> DeviceDescription:
        """The device, once opened."""
        return self._require_opened()[1]

    @property
    def snapshot(self) -> CacheSnapshot:
        """What is resident there."""
        return self._snapshot

    def memory_used_bytes(self) -> int:
        """What the process holds of the device's memory, of the host's on a CPU, of a pair's fuller card."""
        return max(used_memory_bytes(card) for card in self._choice.cards)

    def close(self) -> None:
        """Lets the thread end once it has done what it was given."""
        self._thread.shutdown(wait=False)

    @property
    def _worker(self) -> DeviceWorker:
        return self._require_opened()[0]

    def _require_opened(self) -> tuple[DeviceWorker, DeviceDescription]:
        if self._opened is None:
            raise RuntimeError("the device was not opened")
        return self._opened

    def _open(self, loop: asyncio.AbstractEventLoop) -> tuple[DeviceWorker, DeviceDescription]:
        set_current_device_id(self._choice.id)
        self._thread_id = threading.get_ident()
        try:
            # The first thing that the device's thread does; whatever names no device there means this one.
            select_device(self._choice.device)
            compute_with(self._cpu_threads)
            description = describe_device(self._choice)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            lost = DeviceLost(f"{self._choice.device} cannot be used: {why}")
            raise translate_memory_error(error) or lost from None

        def publish(snapshot: CacheSnapshot) -> None:
            loop.call_soon_threadsafe(self._note_snapshot, snapshot)

        cache = ModelCache(self._choice, self._budgets, publish=publish, share=self._share)
        return DeviceWorker(self._choice, description, cache, self._watchdog), description

    def _note_snapshot(self, snapshot: CacheSnapshot) -> None:
        self._snapshot = snapshot
