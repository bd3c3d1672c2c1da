"""Metrics of the job store, of the disk below it and of its clock, as they are at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chromarpc_server.domain.store_facts import StoreFacts

DAMAGED = ("image", "row", "database", "adapter")
"""What can be damaged; each has its series from the start, so that the first find is an increase."""


class StoreCollector(Collector):
    """What is known of the store."""

    def __init__(self, facts: Callable[[], StoreFacts], damaged_adapters: Callable[[], int]) -> None:
        """`facts`, `damaged_adapters`: asked at each scrape, on a thread of the port of metrics."""
        self._facts = facts
        self._damaged_adapters = damaged_adapters

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        facts = self._facts()
        failures = CounterMetricFamily(
            "chromarpc_store_failures", "Calls of the job store that failed, by what was asked", labels=["call"]
        )
        for call, count in facts.failures.items():
            failures.add_metric([call], count)
        yield failures
        damaged = CounterMetricFamily(
            "chromarpc_damaged",
            "Damage that was met: image, row (of a job), database, adapter (uploaded or downloaded)",
            labels=["what"],
        )
        for what in DAMAGED:
            count = self._damaged_adapters() if what == "adapter" else facts.damaged.get(what, 0)
            damaged.add_metric([what], count)
        yield damaged
        if facts.free_bytes is not None:
            yield _gauge(
                "chromarpc_data_free_bytes", "Free on the disk of --data-dir, for its user", facts.free_bytes
            )
        yield _gauge(
            "chromarpc_data_reserve_bytes", "With less than this free, nothing new is taken", facts.reserve_bytes
        )
        yield _gauge("chromarpc_store_wal_bytes", "Of SQLite's write-ahead log", facts.wal_bytes)
        yield _gauge("chromarpc_lost_found_files", "Images that no job names, in lost+found", facts.lost_files)
        yield _gauge("chromarpc_lost_found_bytes", "Of those", facts.lost_bytes)
        yield _gauge(
            "chromarpc_sweep_age_seconds",
            "Since what need not be kept longer was last forgotten, or since the start",
            facts.swept_s_ago,
        )
        yield _gauge(
            "chromarpc_clock_ahead_seconds",
            "How far the wall clock is ahead of the store's own time; negative where it is behind",
            facts.clock_ahead_s,
        )
        yield CounterMetricFamily(
            "chromarpc_clock_steps", "How often the wall clock was seen to jump", value=facts.clock_steps
        )

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are checked when they are collected."""
        return iter(())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
