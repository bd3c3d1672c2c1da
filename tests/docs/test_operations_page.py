"""docs/operations.md knows every setting, every metric and every error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from chromarpc_server.device_settings import RaySettings
from chromarpc_server.domain.devices import DeviceDescription, DeviceState
from chromarpc_server.domain.error_table import ENTRIES
from chromarpc_server.domain.store_facts import StoreFacts
from chromarpc_server.jobs.engine import EngineStatus
from chromarpc_server.limit_settings import LimitSettings
from chromarpc_server.observability.metrics import Metrics
from chromarpc_server.runtime.device import DeviceStatus
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ROWS = re.findall(r"^\| `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


class IdleEngine:
    def status(self) -> EngineStatus:
        description = DeviceDescription("cpu", "a CPU", 1, "float32")
        device = DeviceStatus(description, DeviceState.IDLE, CacheSnapshot(resident_bytes={"chroma": 1}), 1)
        return EngineStatus(0, 0, (device,))

    def store_facts(self) -> StoreFacts:
        return StoreFacts(free_bytes=1)


def metric_names() -> set[str]:
    metrics = Metrics(version="1")
    metrics.observe_engine(IdleEngine(), lambda: True)  # type: ignore[arg-type]
    registry: CollectorRegistry = metrics.registry
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
        if family.name.startswith("chromarpc_")
    }


GROUPS = {"limits": LimitSettings, "ray": RaySettings}
SETTINGS = {
    *(set(ServerSettings.model_fields) - set(GROUPS)),
    *(f"{group}.{name}" for group, settings in GROUPS.items() for name in settings.model_fields),
}


@pytest.mark.parametrize(
    ("known", "belongs"),
    [
        (SETTINGS, lambda row: row in SETTINGS or row.startswith("limits.")),
        (metric_names(), lambda row: row.startswith("chromarpc_")),
        ({entry.reason for entry in ENTRIES}, lambda row: re.fullmatch("[A-Z_]+", row) is not None),
    ],
    ids=["settings", "metrics", "errors"],
)
def test_everything_has_its_row_and_nothing_else_does(known: set[str], belongs: object) -> None:
    assert callable(belongs)
    assert known <= set(ROWS)
    assert {row for row in ROWS if belongs(row)} <= known
