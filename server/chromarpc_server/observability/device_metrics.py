"""Metrics of the devices, each with the id of its device: what they do, what they did, what is resident there.

Of a lost device only state and counters go on: nothing is known of its memory, and nothing in it can be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chromarpc_server.domain.devices import DeviceState
from chromarpc_server.domain.fallbacks import Part
from chromarpc_server.runtime.device import DeviceStatus, merged


class DeviceCollector(Collector):
    """The devices, asked for at each scrape, on a thread of the port of metrics."""

    def __init__(self, devices: Callable[[], Sequence[DeviceStatus]]) -> None:
        """`devices`: every one that joined, lost ones included."""
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        devices = self._devices()
        working = [device for device in devices if device.state is not DeviceState.LOST]
        yield _states(devices)
        yield from _work(devices)
        yield _prepared_sets(devices)
        yield _resident(working)
        yield _memory(working)
        yield _fallbacks(working)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are checked when they are collected."""
        return iter(())


def _states(devices: Sequence[DeviceStatus]) -> Metric:
    counts = Counter(device.state for device in devices)
    metric = GaugeMetricFamily(
        "chromarpc_devices",
        "Devices by what they do: opening, idle, busy; or lost, for as long as they are listed",
        labels=["state"],
    )
    for state in DeviceState:
        metric.add_metric([state.value], counts[state])
    return metric


def _work(devices: Sequence[DeviceStatus]) -> Iterator[Metric]:
    running = GaugeMetricFamily("chromarpc_device_running", "1 while the device runs a job", labels=["device"])
    jobs = CounterMetricFamily(
        "chromarpc_device_jobs", "Jobs that the device was given, each attempt counted", labels=["device"]
    )
    busy = CounterMetricFamily(
        "chromarpc_device_busy_seconds",
        "Time that the device spent on jobs that it has done with",
        labels=["device"],
    )
    for device in devices:
        name = device.description.id
        running.add_metric([name], int(device.state is DeviceState.BUSY))
        jobs.add_metric([name], device.jobs)
        busy.add_metric([name], device.busy_s)
    yield from (running, jobs, busy)


def _prepared_sets(devices: Sequence[DeviceStatus]) -> Metric:
    metric = CounterMetricFamily(
        "chromarpc_prepared_sets",
        "What the device's cache of prepared weights did: hit, switch, build, eviction",
        labels=["event", "device"],
    )
    for device in devices:
        counters = device.cache.counters
        for event, count in (
            ("hit", counters.hits),
            ("switch", counters.switches),
            ("build", counters.builds),
            ("eviction", counters.evictions),
        ):
            metric.add_metric([event, device.description.id], count)
    return metric


def _resident(devices: Sequence[DeviceStatus]) -> Metric:
    metric = GaugeMetricFamily(
        "chromarpc_resident_bytes",
        "Memory of weights: checkpoint (of a model, all that is its included), prepared_sets (of a model), "
        "trainer_parts (of a model: text encoders of the preview profiles), adapters (parsed, on the host for all "
        "devices, so without a device)",
        labels=["what", "model", "device"],
    )
    for device in devices:
        cache, name = device.cache, device.description.id
        for model, size in cache.resident_bytes.items():
            metric.add_metric(["checkpoint", model, name], size)
            sets = sum(held.size_bytes for held in cache.sets if held.key.model_id == model)
            metric.add_metric(["prepared_sets", model, name], sets)
            metric.add_metric(["trainer_parts", model, name], cache.trainer_parts_bytes.get(model, 0))
    metric.add_metric(["adapters", "", ""], merged([device.cache for device in devices]).adapter_bytes)
    return metric


def _memory(devices: Sequence[DeviceStatus]) -> Metric:
    metric = GaugeMetricFamily(
        "chromarpc_device_memory_bytes",
        "Memory of the device (of the host on a CPU): total, and used by this process",
        labels=["device", "state"],
    )
    for device in devices:
        metric.add_metric([device.description.id, "total"], device.description.memory_bytes)
        metric.add_metric([device.description.id, "used"], device.memory_used_bytes)
    return metric


def _fallbacks(devices: Sequence[DeviceStatus]) -> Metric:
    metric = GaugeMetricFamily(
        "chromarpc_device_fallback",
        "1 where the device does without what makes it fast, else 0: "
        "kernels, attention, decoder, step_graphs, encoder_graph",
        labels=["device", "without"],
    )
    for device in devices:
        missed = {fallback.without for fallback in device.cache.fallbacks}
        for part in Part:
            metric.add_metric([device.description.id, part.value], int(part in missed))
    return metric
