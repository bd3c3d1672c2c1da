"""docs/operations.md knows every setting, every metric and every error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.error_table import ENTRIES
from chromarpc_server.domain.store_facts import StoreFacts
from chromarpc_server.jobs.engine import EngineStatus
from chromarpc_server.limit_settings import LimitSettings
from chromarpc_server.observability.metrics import Metrics
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ROWS = re.findall(r"^\| `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


class IdleEngine:
    description = DeviceDescription("cpu", "a CPU", 1, "float32")

    def status(self) -> EngineStatus:
        return EngineStatus(0, 0, CacheSnapshot(resident_bytes={"chroma": 1}))

    def store_facts(self) -> StoreFacts:
        return StoreFacts(free_bytes=1)

    def memory_used_bytes(self) -> int:
        return 1


def metric_names() -> set[str]:
    metrics = Metrics(version="1")
    metrics.observe_engine(IdleEngine(), lambda: True)  # type: ignore[arg-type]
    registry: CollectorRegistry = metrics.registry
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
        if family.name.startswith("chromarpc_")
    }


SETTINGS = {*ServerSettings.model_fields, *(f"limits.{name}" for name in LimitSettings.model_fields)} - {"limits"}


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
