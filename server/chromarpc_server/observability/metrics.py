"""Metrics for Prometheus.

No label comes from a client: models, profiles, methods, reasons and devices are sets that the server decides on.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chromarpc_server.adapters.damage import damaged_adapters
from chromarpc_server.domain.events import (
    Cancelled,
    Completed,
    Event,
    Failed,
    ImageHeader,
    Prepared,
    Restarted,
    Step,
)
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.jobs.observer import JobObserver
from chromarpc_server.observability.device_metrics import DeviceCollector
from chromarpc_server.observability.store_metrics import StoreCollector
from chromarpc_server.transport.access.interceptor import Call
from chromarpc_server.transport.access.outcomes import outcome

SIZES_PX = (256, 512, 1024, 2048)
"""Sides of squares: an image counts as the smallest one whose area it does not exceed."""

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
_LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


def size_label(pixels: int) -> str:
    """`512` for images of up to 512 × 512 pixels; `larger` beyond the last."""
    return next((str(side) for side in SIZES_PX if pixels <= side * side), "larger")


class Metrics:
    """One registry, filled from jobs' events, from calls, and at each look from the engine."""

    def __init__(self, *, version: str) -> None:
        """`version`: of chromarpc."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        registry = self.registry
        self._jobs = Counter(
            "chromarpc_jobs",
            "Jobs that ended, by outcome (succeeded, failed, cancelled) and, unless they succeeded, by reason",
            ["model", "profile", "outcome", "reason"],
            registry=registry,
        )
        self._restarts = Counter(
            "chromarpc_job_restarts",
            "Jobs that were running when an earlier process ended, and are run again",
            ["model", "profile"],
            registry=registry,
        )
        self._moves = Counter(
            "chromarpc_job_moves",
            "Jobs that go to another device because this one was lost",
            ["device"],
            registry=registry,
        )
        self._job_s = Histogram(
            "chromarpc_job_seconds",
            "Time from a job's admission to its success",
            ["model", "profile"],
            buckets=_LONG_S,
            registry=registry,
        )
        self._wait_s = Histogram(
            "chromarpc_queue_wait_seconds",
            "Time a job waited for its downloads and for a device",
            ["model"],
            buckets=_LONG_S,
            registry=registry,
        )
        self._stage_s = Histogram(
            "chromarpc_stage_seconds",
            "Time that jobs that succeeded spent loading, text_encoding, denoising, decoding, image_encoding",
            ["model", "profile", "stage"],
            buckets=_LONG_S,
            registry=registry,
        )
        self._step_s = Histogram(
            "chromarpc_step_seconds",
            "Time of one denoising step; size is the side of the smallest of the squares 256, 512, 1024, 2048 "
            "that holds as many pixels as the image, or larger",
            ["model", "profile", "size"],
            buckets=_STEP_S,
            registry=registry,
        )
        self._images = Counter("chromarpc_images", "Images that were encoded", ["media_type"], registry=registry)
        self._image_bytes = Counter("chromarpc_image_bytes", "Bytes of encoded images", registry=registry)
        self._weights = Counter(
            "chromarpc_weights",
            "Jobs by where their weights came from: resident, switched in place, or built",
            ["model", "source"],
            registry=registry,
        )
        self._switch_s = Histogram(
            "chromarpc_weights_seconds",
            "Time to have a job's adapters merged, by source",
            ["source"],
            buckets=(*_SHORT_S, 10, 30, 60),
            registry=registry,
        )
        self._peak = Gauge(
            "chromarpc_job_peak_memory_bytes",
            "Most of the device's memory in use at once during the last job that succeeded there",
            ["device"],
            registry=registry,
        )
        self._lag_s = Histogram(
            "chromarpc_event_lag_seconds",
            "Time from an event to the moment a watcher's stream has taken it",
            buckets=_SHORT_S,
            registry=registry,
        )
        self._calls = Counter(
            "chromarpc_calls", "Calls that ended, by status code", ["method", "code"], registry=registry
        )
        self._call_s = Histogram(
            "chromarpc_call_seconds",
            "Time of calls with a single answer",
            ["method"],
            buckets=_SHORT_S,
            registry=registry,
        )
        self._in_progress = Gauge(
            "chromarpc_calls_in_progress", "Calls in progress, streams among them", ["method"], registry=registry
        )
        Gauge("chromarpc_info", "1, with the server's version", ["version"], registry=registry).labels(
            version
        ).set(1)

    def observe_engine(self, engine: Engine, is_ready: Callable[[], bool]) -> None:
        """Collects the engine's state, its devices' and its store's too, as they are at each scrape."""
        self.registry.register(_EngineCollector(engine, is_ready))
        self.registry.register(DeviceCollector(lambda: engine.status().devices))
        self.registry.register(StoreCollector(engine.store_facts, damaged_adapters))

    @property
    def observer(self) -> JobObserver:
        """For the engine."""
        return JobObserver(event=self._event, read=self._read)

    def _event(self, job: Job, event: Event) -> None:
        model, profile = job.plan.served_model, job.plan.profile
        match event:
            case Prepared(weights=weights):
                self._weights.labels(model, weights.source.value).inc()
                self._switch_s.labels(weights.source.value).observe(weights.duration_s)
            case Restarted(moved_from=device) if device:
                self._moves.labels(device).inc()
            case Restarted():
                self._restarts.labels(model, profile).inc()
            case Step(prompt_index=index, duration_s=seconds):
                prompt = job.plan.prompts[index]
                size = size_label(prompt.width * prompt.height)
                self._step_s.labels(model, profile, size).observe(seconds)
            case ImageHeader(media_type=media_type, size_bytes=size_bytes):
                self._images.labels(media_type).inc()
                self._image_bytes.inc(size_bytes)
            case Completed(timings=timings, peak_memory_bytes=peak):
                self._jobs.labels(model, profile, "succeeded", "").inc()
                self._job_s.labels(model, profile).observe(timings.total_s)
                for stage in ("loading", "text_encoding", "denoising", "decoding", "image_encoding"):
                    self._stage_s.labels(model, profile, stage).observe(getattr(timings, f"{stage}_s"))
                self._peak.labels(job.device_id).set(peak)
            case Failed(error=error):
                self._jobs.labels(model, profile, "failed", error.reason).inc()
            case Cancelled(error=error):
                self._jobs.labels(model, profile, "cancelled", error.reason).inc()
            case _:
                pass
        if isinstance(event, Completed | Failed | Cancelled) and job.started_at is not None:
            self._wait_s.labels(model).observe(job.started_at - job.admitted_at)

    def _read(self, logged: LoggedEvent) -> None:
        self._lag_s.observe(max(0.0, time.time() - logged.time.timestamp()))

    @asynccontextmanager
    async def middleware(self, call: Call) -> AsyncIterator[None]:
        """Counts a call."""
        started = time.monotonic()
        ended_by: BaseException | None = None
        with self._in_progress.labels(call.method).track_inprogress():
            try:
                yield
            except BaseException as error:
                ended_by = error
                raise
            finally:
                self._calls.labels(call.method, outcome(call, ended_by).name).inc()
                del ended_by  # it holds this frame
                if not call.streams:
                    self._call_s.labels(call.method).observe(time.monotonic() - started)


class _EngineCollector(Collector):
    """The engine's state, asked for at each look."""

    def __init__(self, engine: Engine, is_ready: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        status = self._engine.status()
        yield _gauge("chromarpc_ready", "1 while requests are taken, else 0", int(self._is_ready()))
        yield _gauge(
            "chromarpc_queued_jobs", "Jobs waiting for their downloads or for a device", status.queued_jobs
        )
        yield _gauge("chromarpc_running_jobs", "Jobs on devices", status.running_jobs)
        yield _gauge("chromarpc_stored_jobs", "Jobs that ended and are kept", status.stored.jobs)
        yield _gauge("chromarpc_stored_bytes", "Of their events and images", status.stored.bytes)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are checked when they are collected."""
        return iter(())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
