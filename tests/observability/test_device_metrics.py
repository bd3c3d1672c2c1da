"""Metrics of several devices: a series for each, and of a lost one only what stays true of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from chromarpc_server.domain.devices import DeviceState
from chromarpc_server.domain.events import Completed, Restarted, Timings
from chromarpc_server.observability.metrics import Metrics
from chromarpc_server.runtime.device import DeviceStatus
from tests.two_devices import FIRST, LOST, MODEL, SECOND, EngineOf

PAIR, OTHER = FIRST.description.id, SECOND.description.id


def look(*devices: DeviceStatus, metrics: Metrics | None = None) -> dict[tuple[str, ...], float]:
    metrics = metrics or Metrics(version="1")
    metrics.observe_engine(EngineOf(*devices), lambda: True)  # type: ignore[arg-type]
    return dict(_samples(metrics))


def _samples(metrics: Metrics) -> Iterator[tuple[tuple[str, ...], float]]:
    for family in metrics.registry.collect():
        for sample in family.samples:
            yield (sample.name, *(f"{name}={text}" for name, text in sorted(sample.labels.items()))), sample.value


def job(device_id: str) -> Any:
    return SimpleNamespace(
        plan=SimpleNamespace(served_model=MODEL, profile="exact"),
        device_id=device_id,
        started_at=2.0,
        admitted_at=1.0,
    )


def test_each_device_has_its_own_series() -> None:
    found = look(FIRST, SECOND)
    expected = {
        ("chromarpc_devices", "state=busy"): 1,
        ("chromarpc_devices", "state=idle"): 1,
        ("chromarpc_devices", "state=lost"): 0,
        ("chromarpc_devices", "state=opening"): 0,
        ("chromarpc_device_running", f"device={PAIR}"): 1,
        ("chromarpc_device_running", f"device={OTHER}"): 0,
        ("chromarpc_device_jobs_total", f"device={PAIR}"): 7,
        ("chromarpc_device_jobs_total", f"device={OTHER}"): 3,
        ("chromarpc_device_busy_seconds_total", f"device={PAIR}"): 61.5,
        ("chromarpc_device_busy_seconds_total", f"device={OTHER}"): 20,
        ("chromarpc_device_memory_bytes", f"device={PAIR}", "state=total"): 80_000,
        ("chromarpc_device_memory_bytes", f"device={PAIR}", "state=used"): 1234,
        ("chromarpc_device_memory_bytes", f"device={OTHER}", "state=used"): 567,
        ("chromarpc_device_fallback", f"device={PAIR}", "without=kernels"): 0,
        ("chromarpc_device_fallback", f"device={OTHER}", "without=kernels"): 1,
        ("chromarpc_device_fallback", f"device={OTHER}", "without=decoder"): 0,
        ("chromarpc_prepared_sets_total", f"device={PAIR}", "event=hit"): 5,
        ("chromarpc_prepared_sets_total", f"device={OTHER}", "event=hit"): 1,
        ("chromarpc_prepared_sets_total", f"device={OTHER}", "event=build"): 2,
        ("chromarpc_resident_bytes", f"device={PAIR}", f"model={MODEL}", "what=checkpoint"): 900,
        ("chromarpc_resident_bytes", f"device={PAIR}", f"model={MODEL}", "what=prepared_sets"): 300,
        ("chromarpc_resident_bytes", f"device={PAIR}", f"model={MODEL}", "what=trainer_parts"): 70,
        ("chromarpc_resident_bytes", f"device={OTHER}", f"model={MODEL}", "what=checkpoint"): 500,
        ("chromarpc_running_jobs",): 1,
        ("chromarpc_queued_jobs",): 4,
    }
    assert expected.items() <= found.items()


def test_parsed_adapters_lie_on_the_host_and_count_once() -> None:
    adapters = {key: size for key, size in look(FIRST, SECOND).items() if "what=adapters" in key}
    assert adapters == {("chromarpc_resident_bytes", "device=", "model=", "what=adapters"): 40}


def test_a_lost_device_is_counted_as_lost_and_keeps_its_counters_alone() -> None:
    found = look(FIRST, LOST)
    assert found["chromarpc_devices", "state=lost"] == 1
    assert {key[0]: value for key, value in found.items() if f"device={OTHER}" in key and len(key) == 2} == {
        "chromarpc_device_running": 0,
        "chromarpc_device_jobs_total": 3,
        "chromarpc_device_busy_seconds_total": 20,
    }
    kept = {key[0] for key in found if f"device={OTHER}" in key}
    assert "chromarpc_prepared_sets_total" in kept
    assert not kept & {
        "chromarpc_device_memory_bytes",
        "chromarpc_device_fallback",
        "chromarpc_resident_bytes",
    }
    assert found["chromarpc_device_memory_bytes", f"device={PAIR}", "state=used"] == 1234


def test_without_any_device_every_state_still_has_its_series() -> None:
    found = look()
    assert {key[1]: value for key, value in found.items() if key[0] == "chromarpc_devices"} == {
        f"state={state.value}": 0 for state in DeviceState
    }


def test_a_device_that_opens_is_no_idle_one() -> None:
    found = look(replace(SECOND, state=DeviceState.OPENING))
    assert (found["chromarpc_devices", "state=opening"], found["chromarpc_devices", "state=idle"]) == (1, 0)


def test_jobs_that_leave_a_lost_device_are_no_restarts_of_the_process() -> None:
    metrics = Metrics(version="1")
    metrics.observer.on_event(job(OTHER), Restarted(2, moved_from=PAIR))
    metrics.observer.on_event(job(OTHER), Restarted(2))
    metrics.observer.on_event(job(OTHER), Restarted(2))
    found = look(metrics=metrics)
    assert found["chromarpc_job_moves_total", f"device={PAIR}"] == 1
    assert found["chromarpc_job_restarts_total", f"model={MODEL}", "profile=exact"] == 2


def test_the_peak_of_memory_is_the_devices_that_ran_the_job() -> None:
    metrics = Metrics(version="1")
    metrics.observer.on_event(job(PAIR), Completed(Timings(), 100, 1))
    metrics.observer.on_event(job(OTHER), Completed(Timings(), 200, 1))
    found = look(metrics=metrics)
    assert found["chromarpc_job_peak_memory_bytes", f"device={PAIR}"] == 100
    assert found["chromarpc_job_peak_memory_bytes", f"device={OTHER}"] == 200
