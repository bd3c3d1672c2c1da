"""An actor's end: the device thread of any server, whose work comes from another machine.

Everything but the device's thread lives on one event loop. An actor serves one connection and ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from chromarpc_server.cluster.certificate import NAME, make_actor_tls
from chromarpc_server.cluster.drawing import Drawing
from chromarpc_server.cluster.host_files import HostFiles, Pieces
from chromarpc_server.cluster.host_log import LogSender
from chromarpc_server.cluster.invitation import Invitation
from chromarpc_server.cluster.link import Link
from chromarpc_server.cluster.messages import (
    Beat,
    Cancel,
    Ended,
    HashedFile,
    HostSettings,
    Load,
    Open,
    Opened,
    Piece,
    Reports,
    Resident,
    Run,
    Wanted,
)
from chromarpc_server.cluster.versions import own_versions
from chromarpc_server.cluster.wire import NotOurs
from chromarpc_server.domain.errors import ChromaError, DeviceLost, LoraDamaged, WeightsMissing
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.jobs.encoding import ImageEncoder
from chromarpc_server.pipeline import CheckpointFiles, choose_device, import_ahead
from chromarpc_server.platform_folders import default_data_dir
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Report, Work, WorkDone

log = logging.getLogger(__name__)

BEAT_EVERY_S = 0.5
CONNECT_S = 30.0
USER_TIMEOUT_MS = 60_000
"""How long the server's machine may leave bytes unacknowledged before it is taken to be gone."""


def serve(invitation: Invitation) -> None:
    """Serves the connection that the invitation is for, until it ends."""
    asyncio.run(_serve(invitation))


async def _serve(invitation: Invitation) -> None:
    versions = await asyncio.to_thread(own_versions)
    reader, writer = await asyncio.wait_for(
        asyncio.open_connection(
            invitation.host, invitation.port, ssl=make_actor_tls(invitation.trusted), server_hostname=NAME
        ),
        CONNECT_S,
    )
    _watch_connection(writer.get_extra_info("socket"))
    link = Link(reader, writer)
    link.greet(
        {
            "actor": invitation.actor,
            "token": invitation.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": dict(versions),
        }
    )
    _log_to(link)
    await HostServer(link).serve()


def _watch_connection(connection: socket.socket | None) -> None:
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class HostServer:
    """Does what one server wants done on this process's device."""

    def __init__(self, link: Link) -> None:
        """`link`: to the server, which has been greeted."""
        self._link = link
        self._running_time = RunningTime()
        self._encoder = ImageEncoder()
        self._device: DeviceThread | None = None
        self._settings = HostSettings()
        self._models: dict[str, ModelSpec] = {}
        self._model_files = ModelFiles()
        self._files = HostFiles(default_data_dir(), 0)
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._fetches = 0
        self._current: tuple[int, Cancellation] = (0, Cancellation())
        self._working: asyncio.Task[None] | None = None
        self._reports: list[Report] = []
        self._told: CacheSnapshot | None = None

    async def serve(self) -> None:
        """Returns once the connection has ended."""
        beating = None
        try:
            while True:
                message = await self._link.receive()
                match message:
                    case Open():
                        await self._open(message)
                        beating = asyncio.create_task(self._beat())
                    case Run():
                        self._start(message.epoch, partial(self._run, message))
                    case Load():
                        self._start(message.epoch, partial(self._load, message))
                    case Cancel(epoch=epoch, cause=cause):
                        if epoch == self._current[0]:
                            self._current[1].cancel(cause)
                    case Piece(fetch=fetch) if fetch == self._fetches:
                        self._pieces.put_nowait(message)
        except (EOFError, OSError, NotOurs):
            return  # whatever it computes, nobody waits for it
        finally:
            if beating is not None:
                beating.cancel()
            self._current[1].cancel(DeviceLost("the server is gone"))
            if self._device is not None:
                self._device.close()
            self._encoder.close()
            self._running_time.close()
            self._link.abort()

    async def _open(self, message: Open) -> None:
        settings = self._settings = message.settings
        self._models = {spec.id: spec for spec in settings.models}
        self._model_files = ModelFiles(dict(settings.model_folders))
        folder = settings.content_folder or default_data_dir() / "cluster-adapters"
        self._files = HostFiles(folder, settings.content_bytes)
        self._running_time.start()
        try:
            parts = await asyncio.to_thread(self._required_parts)
            import_ahead()
            choice = choose_device(settings.device, settings.dtype, threads=settings.threads)
            choice = replace(choice, id=message.device_id)
            self._device = DeviceThread(choice, self._running_time, settings.budgets, settings.timeouts)
            description = await self._device.open()
        except ChromaError as error:
            self._link.send(Opened(None, error))
        else:
            self._link.send(Opened(replace(description, host=socket.gethostname()), parts=parts))

    def _required_parts(self) -> dict[str, str]:
        """What this host has of the served models.

        Raises:
            WeightsMissing: it lacks a model that it needs.
        """
        for model_id in self._settings.preloaded_models:
            self._require_files(model_id)
        served = [self._models[model] for model in self._settings.served_models]
        if served and not any(self._model_files.find(spec) for spec in served):
            self._require_files(served[0].id)
        return {
            f"the {found.part.replace('_', ' ')} of {spec.id}": found.facts.fingerprint
            for spec in served
            for found in self._model_files.parts(spec)
            if found.facts.fingerprint
        }

    def _require_files(self, model_id: str) -> CheckpointFiles:
        """The model's files on this host.

        Raises:
            WeightsMissing: naming the host.
        """
        try:
            return self._model_files.require(self._models[model_id])
        except WeightsMissing as error:
            text = error.message.replace("on this server", f"on the host {socket.gethostname()}")
            raise WeightsMissing(
                text, field="model", metadata={**error.metadata, "host": socket.gethostname()}
            ) from None

    def _start(self, epoch: int, work: Callable[[Cancellation], Awaitable[WorkDone | None]]) -> None:
        cancellation = Cancellation()
        self._current = (epoch, cancellation)
        self._working = asyncio.create_task(self._work(epoch, work, cancellation))

    async def _work(
        self, epoch: int, work: Callable[[Cancellation], Awaitable[WorkDone | None]], cancellation: Cancellation
    ) -> None:
        try:
            ended = Ended(epoch, await work(cancellation))
        except ChromaError as error:
            ended = Ended(epoch, error=error)
        except Exception as error:  # noqa: BLE001 - the server says what becomes of the job
            ended = Ended(epoch, traceback="".join(traceback.format_exception(error)))
        self._flush(epoch)
        # After what the device published last, which is on its way to this loop.
        await asyncio.sleep(0)
        self._tell_resident()
        self._link.send(ended)

    async def _load(self, message: Load, _: Cancellation) -> None:
        device = self._require_device()
        files = await asyncio.to_thread(self._require_files, message.model_id)
        await device.load(message.model_id, files, message.profile, message.sizes)

    async def _run(self, message: Run, cancellation: Cancellation) -> WorkDone:
        try:
            return await self._draw(message, cancellation)
        except LoraDamaged as error:
            damaged = error.metadata.get("sha256", "")
        # This host's copy is, not necessarily the server's file: that one is read now, and says so itself.
        await asyncio.to_thread(self._files.forget, damaged)
        return await self._draw(message, cancellation)

    async def _draw(self, message: Run, cancellation: Cancellation) -> WorkDone:
        device = self._require_device()
        model_files = await asyncio.to_thread(self._require_files, message.plan.served_model)
        adapters = [
            await self._files.have(adapter, partial(self._fetch, adapter, cancellation), cancellation.check)
            for adapter in message.adapters
        ]
        work = Work(message.id, message.plan, model_files, tuple(adapters), cancellation)
        drawing = Drawing(work, device.description.dtype, self._encoder, partial(self._report, message.epoch))
        try:
            done = await device.run(work, drawing.take)
            await drawing.finish()
        finally:
            await drawing.give_up()
        return done

    async def _fetch(self, wanted: HashedFile, cancellation: Cancellation) -> Pieces:
        # Pieces of one that was given up may still come, and are dropped.
        self._fetches += 1
        pieces = self._pieces = asyncio.Queue()
        self._link.send(Wanted(wanted.sha256, self._fetches))

        async def next_piece() -> tuple[bytes, bool]:
            while True:
                cancellation.check()
                with suppress(TimeoutError):
                    piece = await asyncio.wait_for(pieces.get(), BEAT_EVERY_S)
                    if piece.error is not None:
                        raise piece.error
                    return piece.data, piece.is_last

        return next_piece

    def _report(self, epoch: int, report: Report) -> None:
        """What comes while the loop is busy leaves together."""
        if not self._reports:
            asyncio.get_running_loop().call_soon(self._flush, epoch)
        self._reports.append(report)

    def _flush(self, epoch: int) -> None:
        reports, self._reports = tuple(self._reports), []
        if reports:
            self._tell_resident()
            self._link.send(Reports(epoch, reports))

    def _tell_resident(self) -> None:
        snapshot = self._require_device().snapshot
        if snapshot is not self._told:
            self._told = snapshot
            self._link.send(Resident(snapshot))

    async def _beat(self) -> None:
        while self._device is not None:
            self._tell_resident()
            self._link.send(Beat(self._device.memory_used_bytes()))
            await asyncio.sleep(BEAT_EVERY_S)

    def _require_device(self) -> DeviceThread:
        if self._device is None:
            raise RuntimeError("the device was not opened")
        return self._device


def _log_to(link: Link) -> None:
    handler = LogSender(asyncio.get_running_loop(), link.send)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("chromarpc_server").setLevel(logging.INFO)
