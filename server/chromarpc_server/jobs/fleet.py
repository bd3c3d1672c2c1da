"""The devices of a server, with a dispatcher each: who joins, who is lost, and what follows. On the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chromarpc_server.domain.devices import DeviceState
from chromarpc_server.domain.errors import ChromaError, DeviceError, DeviceLost
from chromarpc_server.domain.events import Restarted
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.dispatcher import Dispatcher, Left, no_device_for
from chromarpc_server.jobs.tasks import Tasks
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.device import Device, DeviceSource, DeviceStatus, DeviceWithdrawn

log = logging.getLogger(__name__)

LOST_SHOWN_S = 600.0
"""How long a lost device is named, where others come in its place."""


@dataclass(frozen=True)
class Preload:
    """A model that every device has before it runs jobs."""

    model_id: str
    files: CheckpointFiles
    profile: str
    sizes: Sequence[tuple[int, int]]
    """Width and height in pixels of images to warm up for."""


class Fleet:
    """Has each device run jobs for as long as it works."""

    def __init__(
        self,
        source: DeviceSource,
        dispatcher_of: Callable[[Device, Callable[[Dispatcher, DeviceError], Left]], Dispatcher],
        backlog: Backlog,
        tasks: Tasks,
        *,
        on_all_lost: Callable[[], None],
        on_available: Callable[[bool], None],
    ) -> None:
        """Opens nothing; see `open`.

        Args:
            source: where devices come from; closed by `finish_running`.
            dispatcher_of: makes the dispatcher of a device, with what it calls when the device is lost.
            backlog: has the jobs.
            tasks: those of the engine.
            on_all_lost: called when nothing can be computed in this process any more.
            on_available: called when the first device is there, and when none is for the moment.
        """
        self._source = source
        self._dispatcher_of = dispatcher_of
        self._backlog = backlog
        self._tasks = tasks
        self._on_all_lost = on_all_lost
        self._on_available = on_available
        self._dispatchers: list[Dispatcher] = []
        """In the order in which they joined, lost ones included."""
        self._preloads: list[Preload] = []
        self._late: list[Dispatcher] = []
        """Of devices that joined while others were loading: they load what there is to load from `start` on."""
        self._joining: set[asyncio.Task[None]] = set()
        self._is_running = False
        self._is_stopping = False

    async def open(self) -> None:
        """Opens the devices of the start.

        Raises:
            ChromaError: one cannot be used, or there is none.
        """
        await self._source.open(self._join)

    async def preload(self, preload: Preload) -> None:
        """Makes a model resident on every device, on those that join later too.

        Raises:
            ChromaError: one cannot load it, or is lost meanwhile where no other may come in its place.
        """
        self._preloads.append(preload)
        early = [dispatcher for dispatcher in self._working() if dispatcher not in self._late]
        await asyncio.gather(*(self._load_early(dispatcher, preload) for dispatcher in early))

    def start(self) -> None:
        """Runs jobs from now on."""
        self._is_running = True
        for dispatcher in self._working():
            if dispatcher in self._late:
                self._begin_once_loaded(dispatcher, is_first=False)
            else:
                self._begin(dispatcher)
        self._late.clear()

    @property
    def devices(self) -> tuple[DeviceStatus, ...]:
        """Every device that joined; may be asked for from any thread."""
        return tuple(dispatcher.status() for dispatcher in self._dispatchers)

    @property
    def is_available(self) -> bool:
        """Whether a device is there, or will be as soon as a job is."""
        return bool(self._working()) or (self._source.waits_for_more and not self._source.missing())

    def missing(self) -> str:
        """Why no device is there, in one sentence."""
        return self._source.missing()

    async def finish_running(self, grace_s: float) -> None:
        """Returns once no job runs; those that run may take `grace_s`, and are stopped then. No device joins."""
        self._is_stopping = True
        self._source.close()
        for joining in self._joining:
            joining.cancel()  # loading a model may take longer than all jobs that run
        await asyncio.gather(*(dispatcher.finish_running(grace_s) for dispatcher in self._dispatchers))

    def stop_running(self) -> None:
        """Stops the jobs that run, within one step."""
        for dispatcher in self._dispatchers:
            dispatcher.stop_running()

    async def stop(self) -> None:
        """Runs no more jobs."""
        await asyncio.gather(*(dispatcher.stop() for dispatcher in self._dispatchers))

    def close(self) -> None:
        """Lets the devices end."""
        for dispatcher in self._dispatchers:
            dispatcher.device.close()

    def _working(self) -> list[Dispatcher]:
        return [dispatcher for dispatcher in self._dispatchers if dispatcher.state is not DeviceState.LOST]

    def _join(self, device: Device) -> None:
        if self._is_stopping:
            device.close()
            return
        was_available = self.is_available
        dispatcher = self._dispatcher_of(device, self._lost)
        # One that comes back under its name takes its earlier entry's place.
        same = device.description.id
        self._dispatchers = [
            other
            for other in self._dispatchers
            if other.state is not DeviceState.LOST or other.device.description.id != same
        ]
        self._dispatchers.append(dispatcher)
        if self._is_running:
            self._begin_once_loaded(dispatcher, is_first=not was_available)
        elif self._preloads:
            self._late.append(dispatcher)

    def _begin_once_loaded(self, dispatcher: Dispatcher, *, is_first: bool) -> None:
        joining = self._tasks.start(self._join_late(dispatcher, is_first=is_first))
        self._joining.add(joining)
        joining.add_done_callback(self._joining.discard)

    async def _join_late(self, dispatcher: Dispatcher, *, is_first: bool) -> None:
        """What was preloaded is loaded there first, as it was on the others."""
        try:
            for preload in self._preloads:
                await _load(dispatcher.device, preload)
        except DeviceError as error:
            dispatcher.give_up(error)
            return
        except Exception as error:  # the others go on without this one
            if not isinstance(error, ChromaError):
                log.exception("device.cannot_load", extra={"device": dispatcher.device.description.id})
            why = error.message if isinstance(error, ChromaError) else type(error).__name__
            lost = DeviceLost(f"it cannot load a model: {why}")
            dispatcher.give_up(lost)
            self._source.refuse(dispatcher.device, lost)
            return
        if self._is_stopping:
            return
        self._begin(dispatcher)
        if is_first:
            self._on_available(True)

    async def _load_early(self, dispatcher: Dispatcher, preload: Preload) -> None:
        try:
            await _load(dispatcher.device, preload)
        except DeviceError as error:
            if not self._source.waits_for_more:
                raise
            dispatcher.give_up(error)

    def _begin(self, dispatcher: Dispatcher) -> None:
        self._backlog.join(dispatcher)
        dispatcher.start()

    def _lost(self, dispatcher: Dispatcher, error: DeviceError) -> Left:
        """A device is lost. Returns what is left for its job."""
        self._backlog.leave(dispatcher)
        left = Left(self._working(), self._source.waits_for_more)
        device = dispatcher.device.description.id
        if isinstance(error, DeviceWithdrawn):
            log.info("device.returned", extra={"device": device, "left": len(left.devices)})
            self._forget(dispatcher)
        else:
            log.error("device.out", extra={"device": device, "reason": error.reason, "left": len(left.devices)})
            if left.more_may_come:
                asyncio.get_running_loop().call_later(LOST_SHOWN_S, self._forget, dispatcher)
        if left.is_nothing:
            self._backlog.close()
            self._on_all_lost()
            return left
        if not left.devices:
            self._on_available(self.is_available)
        self._look_after_waiting(dispatcher, left)
        return left

    def _forget(self, dispatcher: Dispatcher) -> None:
        self._dispatchers = [other for other in self._dispatchers if other is not dispatcher]

    def _look_after_waiting(self, lost: Dispatcher, left: Left) -> None:
        """Jobs that wait for such a device as was lost go to others, or end where there is none for them."""
        for scheduled in self._backlog.waiting:
            job = scheduled.job
            if job.stays_on == lost.model and not any(other.model == lost.model for other in left.devices):
                job.stays_on = ""
                moved_from = lost.device.description.id
                job.log.append(Restarted(job.attempts + 1, moved_from, bits_may_differ=True))
                self._backlog.offer(scheduled)
            if not left.more_may_come and not any(other.can_compute(job) for other in left.devices):
                self._backlog.cancel(job, no_device_for(job))


async def _load(device: Device, preload: Preload) -> None:
    await device.load(preload.model_id, preload.files, preload.profile, preload.sizes)
