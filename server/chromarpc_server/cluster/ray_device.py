"""A device that an actor has, as the event loop sees it. Knows the connection, and nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.cluster.host_log import write_here
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import (
    Beat,
    Cancel,
    Ended,
    HostSettings,
    Load,
    Logged,
    Open,
    Opened,
    Reports,
    Resident,
    Run,
    Wanted,
)
from chromarpc_server.cluster.outgoing_files import OutgoingFiles, send_file
from chromarpc_server.cluster.wire import NotOurs
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import ChromaError, DeviceError, DeviceHung, DeviceLost
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Emit, Work, WorkDone

log = logging.getLogger(__name__)

OPEN_S = 180.0
"""For opening a device, importing torch there included."""
LOOK_EVERY_S = 0.25
MAX_SILENCE_S = 30.0
"""A host beats twice a second; one that says nothing for so long is gone, whatever it does."""
AFTER_STEP_S = 1.0
"""What the time for a step is exceeded by, at most, before a silent host is given up."""


class HostFailed(RuntimeError):
    """An exception on a host that nobody foresaw; its message is the traceback there."""


class UnfitHost(DeviceLost):
    """A host that answers, and is of no use to this server for now."""


class OtherWeights(UnfitHost):
    """A host's model has another revision than the others'."""


class Revisions:
    """The weights that this server's devices draw with: those of the first that loaded them."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def difference(self, revisions: dict[str, str]) -> str:
        """What differs, of models or parts of models by name; nothing where nothing does."""
        for name, revision in revisions.items():
            known = self._known.setdefault(name, revision)
            if known != revision:
                return f"revision {revision[:12]} of {name} instead of {known[:12]}"
        return ""


@dataclass
class _Call:
    """What the actor is doing for this server."""

    epoch: int
    emit: Emit
    ended: asyncio.Future[WorkDone | None]
    files: dict[str, AdapterFile] = field(default_factory=dict)
    """What the actor may ask for."""
    sending: asyncio.Task[None] | None = None
    """Of the file that it asked for last."""

    def stop_sending(self) -> None:
        """Nobody waits for the rest of it."""
        if self.sending is not None:
            self.sending.cancel()


class RayDevice:
    """Ends with its connection, and never comes back: an actor that is found again is another device."""

    def __init__(
        self,
        device_id: str,
        host: str,
        link: Link,
        files: OutgoingFiles,
        revisions: Revisions,
        running_time: RunningTime,
        settings: HostSettings,
    ) -> None:
        """Says nothing yet; see `open`.

        Args:
            device_id: unique in this process.
            host: the actor's.
            link: to the actor, which is known.
            files: adapters for hosts.
            revisions: of the weights that devices must have.
            running_time: the event loop's.
            settings: for the actor.
        """
        self._id = device_id
        self._host = host
        self._link = link
        self._files = files
        self._revisions = revisions
        self._running_time = running_time
        self._settings = settings
        self._description: DeviceDescription | None = None
        self._snapshot = CacheSnapshot()
        self._memory_used_bytes = 0
        self._epoch = 0
        self._call: _Call | None = None
        self._heard_at = running_time.now()
        self._gone: asyncio.Future[DeviceError] = asyncio.get_running_loop().create_future()
        self._retired: DeviceError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.idle_since = running_time.now()
        """When it last did something."""
        link.on_bytes = self._heard
        link.file_of = self._file_here

    async def open(self) -> DeviceDescription:
        """Opens the device there.

        Raises:
            ChromaError: it cannot be used.
        """
        self._link.send(Open(self._id, self._settings))
        try:
            opened = await asyncio.wait_for(self._opened(), OPEN_S)
        except (EOFError, OSError, NotOurs):
            raise self._end(DeviceLost(f"the actor on {self._host} ended before its device was open")) from None
        except TimeoutError:
            raise self._end(DeviceHung(f"the device on {self._host} was not open in {OPEN_S:g} s")) from None
        if opened.description is None:
            # The connection stays: whoever has it decides how long the actor keeps its GPU.
            raise opened.error or DeviceLost(f"the device on {self._host} cannot be used")
        if difference := self._revisions.difference(dict(opened.parts)):
            raise OtherWeights(f"{self._host} has {difference}")
        self._description = opened.description
        self._start(self._read())
        self._start(self._watch())
        return self._description

    async def load(
        self, model_id: str, files: CheckpointFiles, profile: str, sizes: Sequence[tuple[int, int]] = ()
    ) -> None:
        """See `Device.load`; where the files lie is the host's own matter."""
        del files

        def call(epoch: int) -> Load:
            return Load(epoch, model_id, profile, tuple(sizes))

        await self._do(call, lambda _: None, Cancellation())

    async def run(self, work: Work, emit: Emit) -> WorkDone:
        """See `Device.run`."""
        # Not while it is found out what it is to be sent.
        self.idle_since = self._running_time.now()
        named = await self._files.named(work.adapter_files)
        files = {one.sha256: file for one, file in zip(named, work.adapter_files, strict=True)}

        def call(epoch: int) -> Run:
            return Run(epoch, work.id, work.plan, named)

        done = await self._do(call, emit, work.cancellation, files)
        if done is None:
            raise self._end(DeviceLost(f"the actor on {self._host} does not say what became of its work"))
        return done

    async def lost(self) -> DeviceError:
        """Waits until it is lost, or was given back, while it runs nothing."""
        return await asyncio.shield(self._gone)

    def has_parsed(self, file: AdapterFile) -> bool:
        """Whether an adapter is resident there."""
        return any(file == held for kept in self._snapshot.sets for held, _ in kept.key.adapters)

    @property
    def description(self) -> DeviceDescription:
        """The device, once opened."""
        if self._description is None:
            raise RuntimeError("the device was not opened")
        return self._description

    @property
    def snapshot(self) -> CacheSnapshot:
        """What is resident there, as it last said."""
        return self._snapshot

    @property
    def host(self) -> str:
        """The actor's."""
        return self._host

    @property
    def is_gone(self) -> bool:
        """Whether nothing can be computed there any more."""
        return self._gone.done()

    @property
    def is_busy(self) -> bool:
        """Whether it does something."""
        return self._call is not None

    def memory_used_bytes(self) -> int:
        """What is held of its memory, as it last said."""
        return self._memory_used_bytes

    def close(self) -> None:
        """Ends it, with whatever it does."""
        self._end(DeviceLost(f"the device {self._id} was closed"))

    def give_up(self, error: DeviceError) -> None:
        """It is lost, as somebody else found."""
        self._end(error)

    def retire(self, error: DeviceError) -> None:
        """Ends it once it does nothing; `error` says why."""
        if self._call is None:
            self._end(error)
        elif self._retired is None:
            self._retired = error

    async def _do(
        self,
        call: Callable[[int], Run | Load],
        emit: Emit,
        cancellation: Cancellation,
        files: dict[str, AdapterFile] | None = None,
    ) -> WorkDone | None:
        if self._gone.done():
            raise self._gone.result()
        loop = asyncio.get_running_loop()
        self._epoch += 1
        current = _Call(self._epoch, emit, loop.create_future(), files or {})
        self._call = current

        def cancel() -> None:
            if self._call is current and cancellation.cause is not None:
                self._link.send(Cancel(current.epoch, cancellation.cause))

        try:
            self._link.send(call(current.epoch))
            with cancellation.heard_by(lambda: _later(loop, cancel)):
                return await self._ended(current, cancellation)
        except asyncio.CancelledError:
            self._link.send(Cancel(current.epoch, DeviceLost("the server stops")))
            raise
        finally:
            current.stop_sending()
            self._call = None
            self.idle_since = self._running_time.now()
            if self._retired is not None:
                self._end(self._retired)

    async def _ended(self, current: _Call, cancellation: Cancellation) -> WorkDone | None:
        """Waits for the end of a call, and looks at its deadline, which only this end knows."""
        while True:
            awaited: set[asyncio.Future[Any]] = {current.ended, self._gone}
            await asyncio.wait(awaited, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if current.ended.done():
                return current.ended.result()
            if self._gone.done():
                raise self._gone.result()
            with suppress(ChromaError):
                cancellation.check()

    async def _opened(self) -> Opened:
        while True:
            message = await self._link.receive()
            if isinstance(message, Opened):
                return message
            self._take(message)

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._link.receive())
        except (EOFError, OSError):
            self._end(DeviceLost(f"the connection to the actor on {self._host} ended"))
        except NotOurs as error:
            self._end(DeviceLost(f"the actor on {self._host} sends what cannot be understood: {error}"))
        except Exception:  # whatever it is, nobody would read on
            log.exception("device.unreadable", extra={"device": self._id, "host": self._host})
            self._end(DeviceLost(f"the actor on {self._host} sends what cannot be understood"))

    def _take(self, message: Any) -> None:
        match message:
            case Reports(epoch=epoch, reports=reports):
                call = self._call
                if call is not None and call.epoch == epoch:
                    for report in reports:
                        call.emit(report)
            case Ended():
                self._take_end(message)
            case Beat():
                self._memory_used_bytes = message.memory_used_bytes
            case Resident(snapshot=snapshot):
                self._snapshot = snapshot
                if difference := self._revisions.difference(dict(snapshot.revisions)):
                    self._end(OtherWeights(f"{self._host} has {difference}"))
            case Wanted():
                if self._call is not None:
                    self._call.stop_sending()
                    file = self._call.files.get(message.sha256)
                    self._call.sending = self._start(self._send(file, message))
            case Logged():
                write_here(message, device=self._id, host=self._host)

    def _take_end(self, ended: Ended) -> None:
        call = self._call
        if call is None or call.epoch != ended.epoch or call.ended.done():
            return
        if isinstance(ended.error, DeviceError):
            self._end(ended.error)
        elif ended.error is not None:
            call.ended.set_exception(ended.error)
        elif ended.traceback:
            call.ended.set_exception(HostFailed(ended.traceback))
        else:
            call.ended.set_result(ended.done)

    async def _send(self, file: AdapterFile | None, wanted: Wanted) -> None:
        with suppress(OSError):
            await send_file(self._link, file, wanted)

    async def _watch(self) -> None:
        limit_s = min(MAX_SILENCE_S, self._settings.timeouts.step_s + AFTER_STEP_S)
        while not self._gone.done():
            await asyncio.sleep(LOOK_EVERY_S)
            self._running_time.look()
            if self._running_time.since(self._heard_at) > limit_s:
                log.critical("device.silent", extra={"device": self._id, "host": self._host, "seconds": limit_s})
                self._end(DeviceHung(f"the actor on {self._host} has said nothing for {limit_s:g} s"))

    def _heard(self) -> None:
        self._heard_at = self._running_time.now()

    def _file_here(self, sha256: str, size_bytes: int) -> AdapterFile:
        known = self._files.here(sha256, size_bytes)
        return known or AdapterFile(Path(sha256), size_bytes, 0, 0, 0, Path(), sha256)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _end(self, error: DeviceError) -> DeviceError:
        """Nothing that the actor still says is listened to."""
        if not self._gone.done():
            self._gone.set_result(error)
            self._link.abort()
            current = asyncio.current_task()
            for task in self._tasks - {current}:
                task.cancel()
        return self._gone.result()


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(call)
