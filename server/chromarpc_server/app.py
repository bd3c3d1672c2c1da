"""Composition: settings in, a serving process out. Everything is put together here and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Mapping
from importlib import metadata

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.downloads.cache import DownloadCache
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.public_http.client import PublicClient
from chromarpc_server.adapters.root import AdapterRoot
from chromarpc_server.adapters.sources import AdapterSources
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.adapters.uploads.registry import UploadRegistry
from chromarpc_server.cluster.ray_devices import RayDevices
from chromarpc_server.devices import device_source, model_files_of, require_profiles
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.resolve import PictureRecords, Serving
from chromarpc_server.jobs.engine import DeviceCalls, Engine, EngineRules
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.model_catalogue import served_models
from chromarpc_server.model_settings import parse_size
from chromarpc_server.observability.audit_log import AuditLog
from chromarpc_server.observability.metrics import Metrics
from chromarpc_server.observability.probes import StatusPort
from chromarpc_server.observability.tracing import Tracing
from chromarpc_server.pipeline import (
    PROFILES,
    import_ahead,
    library_versions,
)
from chromarpc_server.ports import require_free
from chromarpc_server.runtime.device import DeviceSource
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.settings import ServerSettings
from chromarpc_server.transport.access.authentication import Authentication
from chromarpc_server.transport.access.callers_file import CallersFile
from chromarpc_server.transport.access.quotas import CallQuotas
from chromarpc_server.transport.access.rates import CallRates
from chromarpc_server.transport.access.tls import ServerTls, TlsFiles
from chromarpc_server.transport.addresses import joined
from chromarpc_server.transport.server import Access, Listening, Services, listen
from chromarpc_server.transport.services.generation import GenerationServicer
from chromarpc_server.transport.services.jobs import JobServicer
from chromarpc_server.transport.services.loras import LoraServicer
from chromarpc_server.transport.services.models import ModelServicer

log = logging.getLogger(__name__)

EXIT_CANNOT_START = 1
EXIT_DEVICE_LOST = 70
UPLOADS_SWEPT_EVERY_S = 30.0
"""How long an upload that expired keeps its room on the disk."""


class App:
    """One server process: its engine, its port and its way to an orderly end."""

    def __init__(self, settings: ServerSettings) -> None:
        """Nothing is opened before `run`."""
        self._settings = settings
        self._stop = asyncio.Event()
        self._exit_code = 0
        self._callers: CallersFile | None = None
        self._audit_log: AuditLog | None = None
        self._engine: Engine | None = None
        self._devices: DeviceSource | None = None
        self._listening: Listening | None = None
        """Once requests are to be served."""
        self.metrics_port: int | None = None
        """Where metrics are served, once they are."""

    def reload(self) -> None:
        """Reads the callers file again, and opens the audit log again; certificates are looked at before each
        connection anyway.
        """
        if self._callers is not None:
            self._callers.reload()
        if self._audit_log is not None:
            self._audit_log.reopen()

    def stop(self) -> None:
        """Begins an orderly stop; `run` returns once it is done."""
        self._stop.set()
        if self._devices is not None:
            self._devices.close()  # also where the start still waits for the first one

    def signalled(self) -> None:
        """Somebody wants the process to end: the first time in good order, the second time at once."""
        if self._stop.is_set() and self._engine is not None:
            log.warning("server.hurried")
            self._engine.hurry()
        self.stop()

    def _all_lost(self) -> None:
        self._exit_code = EXIT_DEVICE_LOST
        self._stop.set()

    def _set_available(self, is_available: bool) -> None:
        """A device is there, or none is for the moment: readiness follows, once everything is preloaded."""
        if self._listening is None or self._stop.is_set():
            return
        if not is_available and self._engine is not None:
            log.error("server.no_device", extra={"reason": self._engine.missing_devices()})
        self._listening.set_serving(is_available)

    async def run(self, started: asyncio.Future[int] | None = None) -> int:
        """Serves until stopped. Returns the process's exit code.

        Args:
            started: is given the port once the server is SERVING.

        Raises:
            ChromaError: the device or a model to preload cannot be used.
            ValueError: a file of TLS or of callers cannot be used.
            OSError: an address cannot be bound, or the audit log cannot be written.
        """
        if self._settings.audit_log is None:
            return await self._run(started)
        with contextlib.closing(AuditLog(self._settings.audit_log)) as self._audit_log:
            return await self._run(started)

    async def _run(self, started: asyncio.Future[int] | None) -> int:
        settings = self._settings
        require_free(settings.wanted_ports())  # before jobs are resumed and weights are read
        import_ahead()
        running_time = RunningTime()
        models = await asyncio.to_thread(served_models, settings)
        devices = device_source(settings, models, running_time)
        serving = self._serving(models, devices)
        model_files = model_files_of(settings, devices)
        access = self._access()
        version = metadata.version("chromarpc")
        metrics = None if settings.metrics_port is None else Metrics(version=version)
        tracing = Tracing(version=version) if settings.traces else None
        library, adapters = await asyncio.to_thread(self._adapters)
        retention = settings.retention()
        folder = settings.data_dir / "jobs" if settings.store == "disk" else None
        engine = Engine(
            devices,
            running_time,
            model_files=model_files,
            adapters=adapters,
            store=await JobStore.open(
                folder,
                retention,
                keeps_prompts=settings.store_prompts,
                reserve_bytes=settings.disk_reserve,
            ),
            rules=EngineRules(
                max_queued_jobs=serving.limits.max_queued_jobs,
                retention=retention,
                restarts=settings.restarts(),
                picture_records=settings.picture_records() is PictureRecords.WRITTEN,
            ),
            calls=DeviceCalls(self._all_lost, self._set_available),
            observers=[part.observer for part in (metrics, tracing) if part is not None],
        )
        self._use(engine, devices)
        await engine.start()
        listening: Listening | None = None
        try:
            await engine.recover(serving.models)
            listening = await listen(
                joined(settings.host, settings.port),
                Services(
                    GenerationServicer(engine, serving),
                    JobServicer(engine, serving),
                    _model_servicer(engine, serving, model_files, library, version),
                    LoraServicer(library, adapters, serving, ModelFiles(settings.model_folder)),
                ),
                access=access,
                middleware=[] if metrics is None else [metrics.middleware],
                interceptors=[] if tracing is None else [tracing.interceptor()],
            )
            status_port = None if metrics is None else self._open_status_port(metrics, engine, listening)
        except BaseException:
            # In good order, so that jobs that were resumed are left to the next process.
            await self._give_up(engine, listening)
            raise
        try:
            stopping = asyncio.create_task(self._stop.wait())
            preloading = asyncio.create_task(self._preload(engine, serving))
            sweeping = asyncio.create_task(self._sweep_uploads(library))
            await asyncio.wait({stopping, preloading}, return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                await preloading
                # Jobs run from here on, and not before: one that was resumed would keep the models waiting.
                self._listening = listening
                engine.begin()
                self._set_available(engine.is_available)
                await self._announce(engine, serving, listening, model_files)
                if started is not None:
                    started.set_result(listening.port)
                await stopping
            for task in (preloading, stopping, sweeping):
                task.cancel()
        finally:
            await self._shut_down(engine, listening)
            access.audit.close()
            await asyncio.to_thread(library.close)
            if status_port is not None:
                status_port.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
        return self._exit_code

    def _use(self, engine: Engine, devices: DeviceSource) -> None:
        self._engine, self._devices = engine, devices
        if isinstance(devices, RayDevices):
            devices.follow(lambda: engine.unended_jobs, lambda: self._set_available(engine.is_available))

    def _serving(self, models: Mapping[str, ModelSpec], devices: DeviceSource) -> Serving:
        """What requests may ask for.

        Raises:
            InvalidParameter: a default profile is not among them.
        """
        settings = self._settings
        require_profiles(settings, models, devices)
        return Serving(
            models=models,
            aliases=settings.alias,
            profiles=devices.profiles,
            default_profile=settings.profile,
            limits=settings.limits.limits(),
            picture_records=settings.picture_records(),
        )

    def _adapters(self) -> tuple[AdapterLibrary, AdapterSources]:
        """Where adapters come from, cleaned of what was left half done.

        Raises:
            OSError: the data folder cannot be used.
        """
        settings, data_dir = self._settings, self._settings.data_dir
        uploaded = ContentStore(data_dir / "loras", LoraSource.UPLOAD, data_dir / "uploads")
        downloaded = ContentStore(data_dir / "downloads", LoraSource.DOWNLOAD)
        room = DiskRoom(data_dir, settings.disk_reserve)
        downloads = None
        try:
            uploads = UploadRegistry(uploaded, settings.upload_limits(), room=room)
            library = AdapterLibrary(AdapterRoot(settings.lora_root), uploads, downloaded)
            if settings.lora_urls:
                limits = settings.download_limits()
                client = PublicClient(
                    connect_s=limits.connect_s, read_s=limits.read_s, allowed_hosts=settings.lora_hosts
                )
                cache = DownloadCache(downloaded, limits.cache_bytes, room)
                downloads = AdapterDownloads(cache, client, limits)
            library.remove_abandoned()
        except OSError as error:
            message = f"the data folder {data_dir} cannot be used: {error.strerror}; see --data-dir"
            raise OSError(message) from None
        return library, AdapterSources(library, downloads)

    def _access(self) -> Access:
        """Who may call.

        Raises:
            ValueError: a file of TLS or of callers cannot be used.
        """
        settings, limits = self._settings, self._settings.limits
        tls = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = ServerTls(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))
        if settings.callers is not None:
            self._callers = CallersFile(settings.callers, limits.caller_limits())
        return Access(
            Authentication(
                self._callers,
                certificates=tls is not None and tls.wants_client_certificates,
                limits=limits.caller_limits(),
            ),
            CallRates(limits.max_calls_per_minute_per_peer),
            CallQuotas(limits.max_streams),
            limits.max_request_bytes,
            limits.max_connections,
            tls,
        )

    def _open_status_port(self, metrics: Metrics, engine: Engine, listening: Listening) -> StatusPort:
        health = listening.health
        metrics.observe_engine(engine, lambda: health.is_ready)
        port = StatusPort(
            self._settings.metrics_host,
            self._settings.metrics_port or 0,
            metrics.registry,
            is_alive=lambda: health.is_alive,
            is_ready=lambda: health.is_ready,
            why_not_ready=lambda: "" if engine.is_available else engine.missing_devices(),
        )
        self.metrics_port = port.port
        log.info("metrics.listening", extra={"host": self._settings.metrics_host, "port": port.port})
        return port

    def _admits(self) -> str:
        settings = self._settings
        encryption = "no encryption" if settings.tls_cert is None else "TLS"
        if self._callers is not None:
            return f"{encryption}, {self._callers.count} known callers"
        return (
            f"{encryption}, {'client certificates' if settings.tls_client_ca else 'open to all who can connect'}"
        )

    async def _preload(self, engine: Engine, serving: Serving) -> None:
        settings = self._settings
        for model_id in settings.preload:
            log.info("model.preloading", extra={"model": model_id})
            served = serving.models[settings.alias.get(model_id, model_id)]
            sizes = settings.warm_up or [f"{served.defaults.width}x{served.defaults.height}"]
            await engine.preload(
                served, served.defaults.profile or settings.profile, [parse_size(size) for size in sizes]
            )

    async def _sweep_uploads(self, library: AdapterLibrary) -> None:
        """Drops uploads that nobody goes on with, whether others begin or not."""
        every_s = min(UPLOADS_SWEPT_EVERY_S, self._settings.upload_expiry_s)
        while True:
            await asyncio.sleep(every_s)
            try:
                await asyncio.to_thread(library.uploads.drop_expired)
            except OSError:
                log.exception("housekeeping.failed")

    async def _announce(
        self, engine: Engine, serving: Serving, listening: Listening, model_files: ModelFiles
    ) -> None:
        settings = self._settings
        devices = [one.description for one in engine.status().devices]
        told = {
            "device": ",".join(device.id for device in devices),
            "device_name": ",".join(sorted({device.name for device in devices})),
            "dtype": ",".join(sorted({device.dtype for device in devices})),
        }
        log.info("server.serving", extra=told)
        print(
            f"chromarpc-server listens on {joined(settings.host, listening.port)} ({self._admits()})", flush=True
        )
        for spec in serving.models.values():
            served = serving.models[settings.alias.get(spec.id, spec.id)]
            state = await asyncio.to_thread(model_files.state, served)
            by = f" (served by {served.id})" if served is not spec else ""
            print(f"  {spec.id}{by}: {state}", flush=True)
        root = settings.lora_root
        print(f"  adapters: {root if root is not None else 'none served (set --lora-root DIR)'}", flush=True)

    async def _give_up(self, engine: Engine, listening: Listening | None) -> None:
        await engine.drain(0)
        if listening is not None:
            await listening.server.stop(grace=0)

    async def _shut_down(self, engine: Engine, listening: Listening) -> None:
        log.info("server.stopping", extra={"grace_s": self._settings.grace_s})
        if self._exit_code:
            listening.health.set_dead()
        listening.set_serving(False)
        await engine.drain(0 if self._exit_code else self._settings.grace_s)
        listening.health.close()
        # Every stream has had its last event by now; this waits for their bytes to leave.
        await listening.server.stop(grace=5.0)
        log.info("server.stopped", extra={"exit_code": self._exit_code})


def _model_servicer(
    engine: Engine, serving: Serving, model_files: ModelFiles, library: AdapterLibrary, version: str
) -> ModelServicer:
    return ModelServicer(
        engine,
        serving,
        model_files,
        library,
        version=version,
        library_versions=library_versions(),
        profile_descriptions={name: profile.description for name, profile in PROFILES.items()},
    )


async def serve(settings: ServerSettings) -> int:
    """Runs a server until SIGTERM or SIGINT. Returns the exit code."""
    app = App(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows has no loop signal handlers
            loop.add_signal_handler(number, app.signalled)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, app.reload)
    try:
        return await app.run()
    except (ChromaError, OSError, ValueError) as error:
        print(f"chromarpc-server cannot start: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
